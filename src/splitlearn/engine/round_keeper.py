"""The thread that writes cohorts' rounds to the disk, so that the engine's never waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Protocol, TypeVar

import structlog

from splitlearn.engine.checkpoint import RunStore
from splitlearn.engine.offers import CohortSnapshot
from splitlearn.engine.run import Run
from splitlearn.errors import CheckpointError, ResourceExhausted, RunLost, SplitLearnError, TrunkDraining

ENGINE_S = 600.0
STOP_S = 30.0
Result = TypeVar("Result")
log = structlog.get_logger("splitlearn.cohort")


class Asks(Protocol):
    """Has something done with a run on the engine's thread."""

    def do(self, name: str, what: Callable[[Run], Result]) -> Future[Result]: ...


class RoundKeeper:
    """What changes while it writes is in its next write: so many rounds as there are make one."""

    def __init__(self, store: RunStore, runs: Asks) -> None:
        self._store = store
        self._runs = runs
        self._names: SimpleQueue[str | None] = SimpleQueue()
        self._waiting: set[str] = set()
        self._thread = threading.Thread(target=self._loop, name="round keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """After what waits has been written."""
        self._names.put(None)
        self._thread.join(STOP_S)

    def changed(self, name: str) -> None:
        """This run has something for the disk. Called on the engine's thread."""
        if name not in self._waiting:
            self._waiting.add(name)
            self._names.put(name)

    def _loop(self) -> None:
        while (name := self._names.get()) is not None:
            self._waiting.discard(name)
            try:
                self._keep(name)
            except (RunLost, TrunkDraining):
                log.info("a run was closed before its last round was kept", run=name)
            except Exception as error:
                # Whatever it was, this thread must go on: others' rounds wait for it, too.
                log.error("rounds could not be kept", run=name, exc_info=error)

    def _keep(self, name: str) -> None:
        try:
            cohort = self._write(name)
        except (CheckpointError, ResourceExhausted) as error:
            failure: SplitLearnError = error
            self._runs.do(name, lambda run: run.of_cohort().not_kept(failure)).result(ENGINE_S)
            raise
        self._runs.do(name, lambda run: run.of_cohort().kept(cohort.count, cohort.end)).result(ENGINE_S)

    def _write(self, name: str) -> CohortSnapshot:
        with self._store.writing:
            snapshot = self._runs.do(name, Run.snapshot).result(ENGINE_S)
            self._store.keep_round(snapshot)
        assert snapshot.cohort is not None
        return snapshot.cohort
