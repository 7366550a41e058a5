import sys
from pathlib import Path

import pytest

from splitlearn.bench.worker import Worker, all_do, workers
from splitlearn.errors import SettingError, StepTimeout, TrunkFailed

HERE = "worker_of_a_test"
SOURCE = """
import time
from splitlearn.bench.worker import do_as_told
from splitlearn.errors import SettingError

class Target:
    def add(self, a, b):
        return a + b
    def refuse(self):
        raise SettingError("this cannot be")
    def sleep(self):
        time.sleep(1)
    def break_down(self):
        raise KeyError("a slip")

do_as_told(Target())
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{HERE}.py").write_text(SOURCE)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *sys.path]))


def test_each_worker_answers_in_its_own_order():
    with workers(HERE, 2) as those:
        assert all_do(those, "add", a=1, b=2) == [3, 3]
        for number, worker in enumerate(those):
            worker.ask("add", a=number, b=10)
        assert [worker.told() for worker in those] == [10, 11]


def test_an_error_there_is_the_same_error_here_and_the_worker_goes_on():
    with Worker(HERE) as worker:
        worker.ask("refuse")
        with pytest.raises(SettingError, match="this cannot be"):
            worker.told()
        worker.ask("add", a=1, b=1)
        assert worker.told() == 2


def test_a_worker_that_breaks_down_says_its_last_line():
    with Worker(HERE) as worker:
        worker.ask("break_down")
        with pytest.raises(TrunkFailed, match="KeyError: 'a slip'"):
            worker.told()


def test_nobody_waits_for_ever():
    with Worker(HERE) as worker:
        worker.ask("sleep")
        with pytest.raises(StepTimeout, match="said nothing"):
            worker.told(timeout_s=0.1)
