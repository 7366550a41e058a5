"""What is asked about runs and adapters between two steps: open, join, restore, load, download."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from splitlearn.engine.adapter_table import AdapterTable
from splitlearn.engine.checkpoint import RunSnapshot
from splitlearn.engine.ends import Awaited
from splitlearn.engine.member import Member
from splitlearn.engine.run import Run
from splitlearn.engine.run_table import RunTable
from splitlearn.engine.step_queue import StepQueue
from splitlearn.engine.trunk_state import AdapterVersion
from splitlearn.errors import RunLost
from splitlearn.vocabulary import StepKey
from splitlearn.wire.messages import AdapterMessage, OpenRun, RunFacts

Result = TypeVar("Result")


class RunRequests:
    """Called from any thread; each is done on the engine's, and what it raises is in its future."""

    def __init__(
        self,
        queue: StepQueue,
        runs: RunTable,
        adapters: AdapterTable,
        refuse_when_draining: Callable[[], None],
    ) -> None:
        self._queue = queue
        self._runs = runs
        self._adapters = adapters
        self._refuse_when_draining = refuse_when_draining

    def open(self, client: bytes, asked: OpenRun) -> Future[RunFacts]:
        self._refuse_when_draining()
        return self._queue.ask(lambda: _facts(self._runs.open(client, asked)))

    def join(self, client: bytes, name: str, member: str = "") -> Future[RunFacts]:
        return self._queue.ask(lambda: _facts(self._runs.join(client, name, member)))

    def renew(self, client: bytes, name: str, incarnation: int) -> Future[RunFacts]:
        """A cohort's member says that it is there."""
        return self._queue.ask(lambda: _facts(self._runs.renew(client, name, incarnation)))

    def leave(self, client: bytes, name: str) -> Future[RunFacts]:
        return self._queue.ask(lambda: _facts(self._runs.leave(client, name)))

    def restore(self, client: bytes, snapshot: RunSnapshot) -> Future[RunFacts]:
        self._refuse_when_draining()
        return self._queue.ask(lambda: _facts(self._runs.restore(client, snapshot)))

    def revive(self, client: bytes, snapshot: RunSnapshot, member: str) -> Future[RunFacts]:
        """A cohort's run, brought back from the disk."""
        self._refuse_when_draining()
        return self._queue.ask(lambda: _facts(self._runs.revive(client, snapshot, member)))

    def keep_rounds(self, changed: Callable[[str], None]) -> None:
        """Before anything is opened: who has cohorts' rounds written to the disk."""
        self._runs.changed = changed

    def snapshot(self, client: bytes, key: StepKey) -> Future[RunSnapshot]:
        """The run as it stands, for the one incarnation that trains it.

        Raises (in the future):
            RunLost, RunTakenOver, RunBroken: as for its steps.
        """
        return self._queue.ask(lambda: self._runs.find(client, key).run.snapshot())

    def close(self, name: str) -> Future[RunFacts]:
        """Raises (in the future) MessageError while members of a cohort train it."""
        return self._queue.ask(lambda: self._close(name))

    def facts(self) -> Future[list[RunFacts]]:
        """Of all that are open."""
        return self._queue.ask(lambda: [run.facts() for run in self._runs])

    def facts_for(self, client: bytes, name: str) -> Future[RunFacts]:
        """Of one that is open, as this client may know it."""
        return self.do(name, lambda run: run.facts_for(client))

    def _close(self, name: str) -> RunFacts:
        self._runs.require_deserted(name)
        return self._runs.close(name).facts()

    def do(self, name: str, what: Callable[[Run], Result]) -> Future[Result]:
        """Have something done with a run between two steps: keep it short."""
        return self._queue.ask(lambda: what(self._runs.named(name)))

    def adapter(self, client: bytes, name: str) -> Future[AdapterMessage]:
        """The trunk's part of a run's adapter as it is now, for its members to take.

        Raises (in the future):
            RunLost: this client has no such run; AccessDenied: it was opened with `allow_download` off.
        """
        return self._queue.ask(lambda: self._runs.owned(client, name).download())

    def ends(self, client: bytes, key: StepKey) -> Future[tuple[Run, Member]]:
        """The run whose ends this member averages with others.

        Raises (in the future):
            RunLost, RunTakenOver, RunBroken: as for its steps; MessageError: none are averaged.
        """
        return self._queue.ask(lambda: self._ends(self._runs.find(client, key)))

    def awaited(self, run: Run) -> Future[Awaited]:
        """Whom an average of this run's ends waits for; raises (in the future) RunLost once it is closed."""
        return self._queue.ask(lambda: self._awaited(run))

    def _ends(self, member: Member) -> tuple[Run, Member]:
        member.run.of_ends()
        return member.run, member

    def _awaited(self, run: Run) -> Awaited:
        if self._runs.named(run.name) is not run:
            raise RunLost(f"run {run.name} was closed: join it again")
        return run.of_cohort().awaited_for_ends()

    def load_adapter(self, client: bytes, message: AdapterMessage) -> Future[AdapterVersion]:
        self._refuse_when_draining()
        return self._queue.ask(lambda: self._adapters.load(client, message).version)

    def unload_adapter(self, client: bytes, name: str) -> Future[int]:
        """The bytes that this frees."""
        return self._queue.ask(lambda: self._adapters.unload(client, name))


def _facts(member: Member) -> RunFacts:
    return member.run.facts(member)
