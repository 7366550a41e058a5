"""Where steps and other requests wait for the engine's thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from splitlearn.engine.step import Step

Request = Callable[[], None]


class StepQueue:
    """Filled by any thread, emptied by the engine's."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._steps: deque[Step] = deque()
        self._requests: deque[Request] = deque()

    def put(self, step: Step) -> None:
        with self._changed:
            self._steps.append(step)
            self._changed.notify()

    def ask(self, request: Request) -> None:
        """Have something done on the engine's thread, before any step that comes later."""
        with self._changed:
            self._requests.append(request)
            self._changed.notify()

    def wait(self, timeout_s: float | None) -> None:
        """Until something waits, or the time is up."""
        with self._changed:
            if not self._steps and not self._requests:
                self._changed.wait(timeout_s)

    def take(self) -> tuple[list[Request], list[Step]]:
        """All that waits, in the order in which it came."""
        with self._changed:
            requests, steps = list(self._requests), list(self._steps)
            self._requests.clear()
            self._steps.clear()
            return requests, steps

    def __len__(self) -> int:
        return len(self._steps)
