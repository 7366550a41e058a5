"""The runs of one trunk: opened under a name, joined again after a loss, closed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from splitlearn.config import RunConfig
from splitlearn.engine import aggregations, optimizer, rules
from splitlearn.engine.account import Accounts
from splitlearn.engine.adapter_table import AdapterTable, fitting
from splitlearn.engine.checkpoint import RunSnapshot
from splitlearn.engine.cohort import Cohort
from splitlearn.engine.ends import Ends, EndsBudget
from splitlearn.engine.member import Member, State
from splitlearn.engine.run import Run
from splitlearn.engine.tape import Tape
from splitlearn.engine.trunk_state import AdapterVersion, TrunkState
from splitlearn.errors import (
    AdapterError,
    MessageError,
    ResourceExhausted,
    RunLost,
    RunTakenOver,
    SettingError,
)
from splitlearn.model import lora
from splitlearn.monitor.events import Listener
from splitlearn.vocabulary import Phase, RunSettings, StepKey
from splitlearn.wire.messages import OpenRun
from splitlearn.wire.share import require_sensible


class RunTable:
    """Belongs to the engine's thread. A run outlives its client's connection; its name brings it back."""

    def __init__(
        self,
        state: TrunkState,
        tape: Tape,
        config: RunConfig,
        adapters: AdapterTable,
        accounts: Accounts | None = None,
    ) -> None:
        self._accounts = accounts or Accounts()
        self._state = state
        self._adapters = adapters
        self._tape = tape
        self._config = config
        self._runs: dict[str, Run] = {}
        self._by_number: dict[int, Member] = {}
        self._ends_budget = EndsBudget(config.max_ends_bytes)
        self.changed: Callable[[str], None] | None = None
        """Told of a cohort's run that has something for the disk."""
        self.listener: Listener | None = None

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs.values())

    @property
    def cohorts(self) -> Iterator[Cohort]:
        return (run.cohort for run in self if run.cohort is not None)

    def open(self, client: bytes, asked: OpenRun) -> Member:
        """A new run, its adapter in the trunk's layers, and its first member.

        Raises:
            MessageError: the name is taken; ResourceExhausted: there are enough runs; AdapterError,
            SettingError: it cannot be trained so.
        """
        run = self._open(client, asked)
        try:
            return self._enter(run, client, asked.member)
        except Exception:
            self.close(run.name)
            raise

    def join(self, client: bytes, name: str, member: str = "") -> Member:
        """The run under this name in a new incarnation, of a cohort this member's alone: older ones are
        turned away from now on.

        Raises:
            RunLost: there is no such run, or a cohort's that has to be brought back from the disk.
        """
        run = self.named(name)
        if run.cohort is None:
            run.charge(self._accounts.of(client))
            run.rejoin(client)
            self._tape.forget_run(run.owner.number)
            return run.owner
        if run.is_broken:
            self.close(name)
            raise RunLost(f"run {name} failed halfway: it is brought back from the disk")
        return self._enter(run, client, member)

    def renew(self, client: bytes, name: str, incarnation: int) -> Member:
        """A cohort's member says that it is there.

        Raises:
            RunLost: it is not; RunTakenOver: it has been joined again since.
        """
        member = self._member_of(client, name)
        return self.find(client, member.key_now(incarnation))

    def leave(self, client: bytes, name: str) -> Member:
        """Raises RunLost where this client is no member of such a run."""
        member = self._member_of(client, name)
        member.run.of_cohort().leave(member)
        self._tape.forget_run(member.number)
        return member

    def restore(self, client: bytes, snapshot: RunSnapshot) -> Member:
        """The run as the snapshot has it, in a new incarnation; opened if it is not open.

        Raises:
            CheckpointError, AdapterError, ResourceExhausted: it cannot be. Where it fails halfway, an open
                run is broken, and a new one is not there.
            MessageError: it is a cohort's, which goes on from where it stands.
        """
        if snapshot.cohort is not None:
            raise MessageError(f"run {snapshot.name} has members: join it, it goes on from where it stands")
        if is_new := snapshot.name not in self._runs:
            self._open(client, OpenRun(snapshot.name, snapshot.settings))
        else:
            self.join(client, snapshot.name)
        run = self.named(snapshot.name)
        self._become(run, snapshot, close_if_not=is_new)
        return run.owner

    def revive(self, client: bytes, snapshot: RunSnapshot, member: str) -> Member:
        """A cohort's run as it was last kept, unless somebody was quicker; joined as this member.

        Raises:
            as `restore`, and as `join`.
        """
        if snapshot.name not in self._runs:
            run = self._open(client, OpenRun(snapshot.name, snapshot.settings))
            self._become(run, snapshot, close_if_not=True)
            for each in run.members:
                self._by_number[each.number] = each
        return self.join(client, snapshot.name, member)

    def named(self, name: str) -> Run:
        """Raises RunLost where no run of this name is open."""
        if name not in self._runs:
            raise _not_open(name)
        return self._runs[name]

    def owned(self, client: bytes, name: str) -> Run:
        """Raises RunLost where no run of this name is open, and where this client has no part in it."""
        if name in self._runs and not self._runs[name].belongs_to(client):
            raise _not_open(name)
        return self.named(name)

    def find(self, client: bytes, key: StepKey) -> Member:
        """Whose step it is, its lease renewed.

        Raises:
            RunLost: it is not here, or another client's; RunTakenOver: somebody has joined it since;
            RunBroken: it is not whole.
        """
        member = self._by_number.get(key.run)
        # A number is no secret. Who trained the run before is told that it was taken over.
        is_anothers = (
            member is not None and member.incarnation == key.incarnation and not member.belongs_to(client)
        )
        if member is None or is_anothers:
            raise RunLost("the run is not held here (it was closed, or the server restarted): join it again")
        run = member.run
        if member.incarnation != key.incarnation:
            whose = f"member {member.name} of " if member.name else ""
            raise RunTakenOver(
                f"{whose}run {run.name} was joined again as incarnation {member.incarnation}: somebody else "
                f"trains it now, and what incarnation {key.incarnation} still sends is refused. Let this "
                "training end"
            )
        run.used_at = time.monotonic()
        run.require_whole()
        has_left = member.state is State.LEFT
        if run.cohort is not None and not (has_left and key.phase is Phase.EVALUATE):
            run.cohort.renew(member)
        return member

    def adapter(self, client: bytes, name: str) -> AdapterVersion:
        """The weights of a run of this client as they are now, or of an adapter that it loaded.

        Raises:
            AdapterError: it has neither; what others have under this name changes nothing.
        """
        if name in self._runs and self._runs[name].belongs_to(client):
            return self._runs[name].current
        if (loaded := self._adapters.find(client, name)) is not None:
            return loaded.version
        raise AdapterError(f"this server has no adapter {name!r}: load it, or leave it out")

    def close(self, name: str) -> Run:
        """Free what the run holds in memory; its checkpoints stay."""
        run = self.named(name)
        del self._runs[name]
        for member in run.members:
            self._by_number.pop(member.number, None)
            self._tape.forget_run(member.number)
        if run.cohort is not None:
            run.cohort.end(RunLost(f"run {name} was closed: join it again"))
        if run.ends is not None:
            run.ends.end()
        run.account.give_back(run.held_bytes)
        if run.slot is not None:
            self._state.slots.remove(run.slot)
        return run

    def expire(self, now: float) -> list[str]:
        """Close the runs that nobody has used for the lease; their names."""
        idle = [run.name for run in self if run.used_at + self._config.run_lease_s < now]
        for name in idle:
            self.close(name)
        return idle

    def require_deserted(self, name: str) -> None:
        """Raises MessageError while members of a cohort train this run."""
        cohort = self.named(name).cohort
        if cohort is not None and (there := cohort.active()):
            # Their names are for members, and whoever asks may be none.
            raise MessageError(
                f"run {name} is trained by {len(there)} of its members: let them leave first, or wait until "
                "their leases have run out"
            )

    def _open(self, client: bytes, asked: OpenRun) -> Run:
        if asked.name in self._runs:
            raise MessageError(f"run {asked.name!r} is open already: join it, or take another name")
        if len(self._runs) >= self._config.max_runs:
            raise ResourceExhausted(
                f"{len(self._runs)} runs are open, this server allows {self._config.max_runs}: close one",
                facts={"runs": len(self._runs), "max_runs": self._config.max_runs},
            )
        settings = asked.settings
        self._check(settings)
        slot, weights = None, {}
        if settings.lora.r:
            slot = self._state.new_slot()
            weights = self._state.slots.add(slot, settings.lora, settings.seed)
        try:
            if slot is not None and asked.start_from:
                weights = self._start(client, asked, weights)
            run = Run(asked.name, settings, slot, weights, client)
            run.charge(self._accounts.of(client))
        except Exception:
            if slot is not None:
                self._state.slots.remove(slot)
            raise
        if not settings.cohort.is_private:
            changed = None if self.changed is None else partial(self.changed, run.name)
            if settings.share.averages:
                run.ends = Ends(run.name, settings, self._ends_budget)
            run.cohort = Cohort(
                run,
                self._config.member_lease_s,
                changed,
                self.listener,
                max_ends_bytes=self._config.max_adapter_bytes,
            )
        else:
            self._by_number[run.owner.number] = run.owner
        self._runs[run.name] = run
        return run

    def _enter(self, run: Run, client: bytes, name: str) -> Member:
        if run.cohort is None:
            return run.owner
        member = run.cohort.join(client, name)
        self._tape.forget_run(member.number)
        self._by_number[member.number] = member
        run.used_at = time.monotonic()
        return member

    def _member_of(self, client: bytes, name: str) -> Member:
        member = self.named(name).of_cohort().of(client)
        if member is None:
            raise RunLost(f"this client is no member of run {name}: join it")
        return member

    def _become(self, run: Run, snapshot: RunSnapshot, *, close_if_not: bool) -> None:
        try:
            run.restore(snapshot)
        except Exception:
            if close_if_not:
                self.close(run.name)
            raise

    def _start(self, client: bytes, asked: OpenRun, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """A loaded adapter's weights in place of drawn ones."""
        loaded = self._adapters.find(client, asked.start_from)
        if loaded is None:
            raise AdapterError(f"no adapter {asked.start_from!r} is loaded on this server: load it first")
        return fitting(loaded.version.weights, drawn)

    def _check(self, settings: RunSettings) -> None:
        """Before anything is added to the trunk."""
        optimizer.require_known(settings.optimizer)
        rules.require_known(settings.cohort)
        aggregations.require_known(settings.cohort)
        if not settings.cohort.is_private and not settings.lora.r:
            raise SettingError("a cohort trains the trunk together: give lora=, and do not freeze the trunk")
        require_sensible(settings.share, settings.cohort)
        self._state.require_precision(settings.precision)
        if settings.lora.r:
            lora.check(settings.lora)
        if settings.tape.checkpoint_every:
            self._state.require_checkpointing()


def _not_open(name: str) -> RunLost:
    return RunLost(f"no run {name!r} is open on this server: open it, or restore it from a checkpoint")
