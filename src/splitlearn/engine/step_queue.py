"""Where steps and other requests wait for the engine's thread, in the order in which they came."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from splitlearn.engine.failures import explained, stopped
from splitlearn.engine.step import Step

Request = Callable[[], None]
Result = TypeVar("Result")


class StepQueue:
    """Filled by any thread, emptied by the engine's, until it is shut."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Step[Any] | Request] = []
        self._wanted = 1
        self._is_urgent = self._is_shut = False

    def put(self, item: Step[Any] | Request) -> bool:
        """Put a step in line, or something else to be done on the engine's thread; False once it is shut."""
        with self._changed:
            if not self._is_shut:
                self._waiting.append(item)
                self._is_urgent |= not (isinstance(item, Step) and item.is_short)
                if self._is_urgent or len(self._waiting) >= self._wanted:
                    self._changed.notify()
            return not self._is_shut

    def ask(self, work: Callable[[], Result]) -> Future[Result]:
        """Have something done on the engine's thread, in its place in line: keep it short."""
        future: Future[Result] = Future()

        def request() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(explained(error))

        if not self.put(request):
            future.set_exception(stopped())
        return future

    def wait(self, timeout_s: float, wanted: int = 1) -> None:
        """Until so many wait, or the time is up: each wake costs as much as taking several in.

        Only steps of few tokens wait for one another; whatever else comes is there at once.
        """
        with self._changed:
            self._wanted = wanted
            self._changed.wait_for(
                lambda: len(self._waiting) >= wanted or self._is_urgent or self._is_shut, timeout_s
            )

    def take(self) -> list[Step[Any] | Request]:
        """All that waits."""
        with self._changed:
            taken, self._waiting = self._waiting, []
            self._is_urgent = False
            return taken

    def shut(self) -> None:
        """Nothing more is taken in."""
        with self._changed:
            self._is_shut = True
            self._changed.notify()
