"""How a client comes to its run: it opens it, joins it where it is there, or has it brought back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from splitlearn.client.member_run import MemberRun
from splitlearn.client.run import ClientRun, require_same
from splitlearn.client.shared_ends import SharedEnds
from splitlearn.client.transport import Transport
from splitlearn.config import ClientConfig
from splitlearn.errors import MessageError, RunLost, RunTakenOver, SettingError
from splitlearn.vocabulary import RunSettings
from splitlearn.wire.messages import SAVED, AdapterMessage, OpenRun, RunFacts

OPEN_TRIES = 5


@dataclass(frozen=True, slots=True)
class Entry:
    """The run as this client found it; `opened_here` where nobody had opened it before."""

    facts: RunFacts
    opened_here: bool = False


def enter(transport: Transport, planned: OpenRun, start: AdapterMessage | None) -> Entry:
    """Open the run, or join the one of its name; `start` is the adapter that a new one begins with.

    Raises:
        SettingError: it is open with other settings, or cannot start from another adapter any more.
    """
    if not planned.settings.cohort.is_private:
        entry = Entry(_enter_cohort(transport, planned, start))
    else:
        entry = _open_or_join(transport, planned, start)
    require_same(entry.facts.name, entry.facts.settings, planned.settings)
    return entry


def restored(transport: Transport, planned: OpenRun, name: str, step: int, digest: int) -> RunFacts:
    """The run as its checkpoint has it; a cohort's as it stands.

    Raises:
        CheckpointError: there is no such checkpoint; SettingError: it has other settings.
    """
    if planned.settings.cohort.is_private:
        facts = transport.restore_run(name, step, digest)
    else:
        facts = transport.join_run(name, planned.member)
    require_same(facts.name, facts.settings, planned.settings)
    return facts


def part_in(
    transport: Transport,
    facts: RunFacts,
    settings: RunSettings,
    config: ClientConfig,
    ends: SharedEnds | None = None,
) -> ClientRun:
    """This client's end of the run; what it shares of bottom and top is the run's from here on."""
    if settings.cohort.is_private:
        return ClientRun(transport, facts, settings, config.train_s)
    member = MemberRun(transport, facts, settings, config, ends)
    try:
        member.refresh_ends()
    except BaseException:
        member.end()
        raise
    return member


def require_own(transport: Transport, run: ClientRun) -> None:
    """Raises RunTakenOver where the run is open as another's, who restored it after ours was lost."""
    try:
        there = transport.run_facts(run.name)
    except RunLost:
        return
    if there.state != SAVED and (there.number, there.incarnation) != (run.number, run.incarnation):
        raise RunTakenOver(
            f"run {there.name} was resumed by somebody else after this side had lost it, and is theirs "
            "now: let this training end"
        )


def _enter_cohort(transport: Transport, planned: OpenRun, start: AdapterMessage | None) -> RunFacts:
    """Whoever comes first opens the run; the others join it."""
    for _ in range(OPEN_TRIES):
        try:
            _require_joinable(transport.run_facts(planned.name), planned, start)
            return transport.join_run(planned.name, planned.member)
        except RunLost:
            try:
                return _open(transport, planned, start)
            except MessageError:
                # Somebody else was quicker.
                continue
    raise RunLost(f"run {planned.name} could be neither joined nor opened: try again")


def _open_or_join(transport: Transport, planned: OpenRun, start: AdapterMessage | None) -> Entry:
    try:
        # To join turns away who trains it now, so that comes last.
        _require_joinable(transport.run_facts(planned.name), planned, start)
        return Entry(transport.join_run(planned.name))
    except RunLost:
        pass
    return Entry(_open(transport, planned, start), opened_here=True)


def _open(transport: Transport, planned: OpenRun, start: AdapterMessage | None) -> RunFacts:
    if start is None or not planned.settings.lora.r:
        return transport.open_run(planned)
    transport.load_adapter(start)
    try:
        return transport.open_run(replace(planned, start_from=start.name))
    finally:
        transport.unload_adapter(start.name)


def _require_joinable(there: RunFacts, planned: OpenRun, start: AdapterMessage | None) -> None:
    if there.state == SAVED:
        return
    require_same(there.name, there.settings, planned.settings)
    if start is not None:
        raise SettingError(
            f"run {there.name} is open already and cannot start from another adapter: "
            "take another run name, or call model.trunk.start_over()"
        )
