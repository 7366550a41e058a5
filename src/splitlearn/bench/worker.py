"""Processes that do what they are told: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

from splitlearn import errors
from splitlearn.errors import SplitLearnError, StepTimeout, TrunkFailed

ANSWER_S = 3600.0
STOP_S = 30.0


class Worker:
    """A module of this package in a process of its own, on one CPU thread; a context manager."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if error is not None:
            self._process.kill()
        self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def ask(self, action: str, **arguments: Any) -> None:
        """Have it done; returns at once."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": action} | arguments), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended() from None

    def told(self, timeout_s: float = ANSWER_S) -> Any:
        """What came of it; raises what it raised there, as the same class with the same words."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            raise StepTimeout(f"a process of this measurement said nothing for {timeout_s:g} s")
        if not (line := self._process.stdout.readline()):
            raise self._ended()
        told = json.loads(line)
        if "error" in told:
            raise getattr(errors, told["error"])(told["message"])
        return told["result"]

    def _ended(self) -> SplitLearnError:
        self._log.seek(0)
        last = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
        return TrunkFailed(f"a process of this measurement ended: {last}")


@contextmanager
def workers(module: str, number: int) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Worker(module)) for _ in range(number)]


def all_do(those: Sequence[Worker], action: str, **arguments: Any) -> list[Any]:
    """What each says, once all have done it side by side."""
    for worker in those:
        worker.ask(action, **arguments)
    return [worker.told() for worker in those]


def do_as_told(target: object) -> None:
    """In the process: call the target's methods by name until nobody asks any more."""
    for line in sys.stdin:
        told = json.loads(line)
        try:
            answer = {"result": getattr(target, told.pop("do"))(**told)}
        except SplitLearnError as error:
            answer = {"error": type(error).__name__, "message": error.message}
        print(json.dumps(answer), flush=True)
