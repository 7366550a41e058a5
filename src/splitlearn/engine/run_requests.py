"""What is asked about runs and adapters between two steps: open, join, restore, load, download."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from splitlearn.engine.adapter_table import AdapterTable
from splitlearn.engine.checkpoint import RunSnapshot
from splitlearn.engine.run import Run
from splitlearn.engine.run_table import RunTable
from splitlearn.engine.step_queue import StepQueue
from splitlearn.engine.trunk_state import AdapterVersion
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
        return self._queue.ask(lambda: self._runs.open(client, asked).facts())

    def join(self, client: bytes, name: str) -> Future[RunFacts]:
        return self._queue.ask(lambda: self._runs.join(client, name).facts())

    def restore(self, client: bytes, snapshot: RunSnapshot) -> Future[RunFacts]:
        self._refuse_when_draining()
        return self._queue.ask(lambda: self._runs.restore(client, snapshot).facts())

    def snapshot(self, key: StepKey) -> Future[RunSnapshot]:
        """The run as it stands, for the one incarnation that trains it.

        Raises (in the future):
            RunLost, RunTakenOver, RunBroken: as for its steps.
        """
        return self._queue.ask(lambda: self._runs.find(key).snapshot())

    def close(self, name: str) -> Future[RunFacts]:
        return self._queue.ask(lambda: self._runs.close(name).facts())

    def facts(self) -> Future[list[RunFacts]]:
        """Of all that are open."""
        return self._queue.ask(lambda: [run.facts() for run in self._runs])

    def do(self, name: str, what: Callable[[Run], Result]) -> Future[Result]:
        """Have something done with a run between two steps: keep it short."""
        return self._queue.ask(lambda: what(self._runs.named(name)))

    def adapter(self, name: str) -> Future[AdapterMessage]:
        """The trunk's part of a run's adapter as it is now, for its members to take.

        Raises (in the future):
            RunLost: there is no such run; AccessDenied: it was opened with `allow_download` off.
        """
        return self.do(name, Run.download)

    def load_adapter(self, message: AdapterMessage) -> Future[AdapterVersion]:
        self._refuse_when_draining()
        return self._queue.ask(lambda: self._adapters.load(message).version)

    def unload_adapter(self, name: str) -> Future[int]:
        """The bytes that this frees."""
        return self._queue.ask(lambda: self._adapters.unload(name))
