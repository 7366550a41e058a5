"""Work for the event loop from other threads: what comes in one go wakes it once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import structlog

log = structlog.get_logger("splitlearn.server")
Work = Callable[[], None]


class Handover:
    """Filled by any thread; the loop's thread does the work, in the order in which it came."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Work] = deque()
        self._is_announced = False

    def put(self, work: Work) -> None:
        """Waking the loop takes longer than most work, so work that finds some ahead of it does not."""
        self._waiting.append(work)
        if not self._is_announced and not self._loop.is_closed():
            self._is_announced = True
            self._loop.call_soon_threadsafe(self._do_all)

    def _do_all(self) -> None:
        # Taken back first: what comes from here on wakes the loop again, rather than be left behind.
        self._is_announced = False
        while self._waiting:
            work = self._waiting.popleft()
            try:
                work()
            except Exception:
                log.exception("an answer could not be handed on")
