"""What a run's deletion meets on the disk is all that there will be of it."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from splitlearn.engine.checkpoint import RunStore
from splitlearn.engine.cohort import Cohort
from splitlearn.engine.round_keeper import RoundKeeper
from splitlearn.engine.run import Run
from splitlearn.errors import RunLost
from splitlearn.vocabulary import CohortSettings, RunSettings

WAIT_S = 30.0


class Table:
    """One open run, until it is closed."""

    def __init__(self) -> None:
        settings = RunSettings(cohort=CohortSettings("sync", members=1))
        self.run: Run | None = Run("notes", settings, None, {"lower": torch.zeros(2)}, b"")
        self.run.cohort = Cohort(self.run, lease_s=60.0)
        self.run.cohort.join(b"a", "a")

    def do(self, name, what):
        done = Future()
        try:
            if self.run is None:
                raise RunLost(f"{name} is closed")
            done.set_result(what(self.run))
        except Exception as error:
            done.set_exception(error)
        return done


class SlowStore(RunStore):
    """Stops before a round is written, until it may go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.is_writing, self.may_write = threading.Event(), threading.Event()

    def keep_round(self, snapshot):
        self.is_writing.set()
        assert self.may_write.wait(WAIT_S)
        return super().keep_round(snapshot)


def test_a_run_that_is_deleted_while_a_round_is_written_leaves_nothing(tmp_path):
    store, table = SlowStore(tmp_path), Table()
    keeper = RoundKeeper(store, table)
    keeper.start()
    keeper.changed("notes")
    assert store.is_writing.wait(WAIT_S)
    table.run = None
    with ThreadPoolExecutor(1) as threads:
        deleting = threads.submit(store.delete, "notes")
        store.may_write.set()
        assert deleting.result(WAIT_S) > 0, "the round was on the disk by then"
    keeper.changed("notes")
    keeper.stop()
    assert not (tmp_path / "notes").exists()
