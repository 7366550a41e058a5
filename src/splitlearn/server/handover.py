"""Work for the event loop from other threads: what comes in one go wakes it once."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

import structlog

log = structlog.get_logger("splitlearn.server")
Work = Callable[[], None]


class Handover:
    """Filled by any thread; the loop's thread does the work, in the order in which it came."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Work] = deque()
        self._is_announced = False
        self._holder: int | None = None

    def put(self, work: Work) -> None:
        """Waking the loop takes longer than most work, so work that finds some ahead of it does not."""
        self._waiting.append(work)
        if threading.get_ident() != self._holder:
            self._announce()

    @contextlib.contextmanager
    def in_one_go(self) -> Iterator[None]:
        """What this thread puts within is announced at its end: one thread's at a time.

        A loop that is awake takes Python's lock, and whoever woke it waits for that before it can go on.
        """
        self._holder = threading.get_ident()
        try:
            yield
        finally:
            self._holder = None
            if self._waiting:
                self._announce()

    def _announce(self) -> None:
        if not self._is_announced and not self._loop.is_closed():
            self._is_announced = True
            # It may be closed by now: then there is nobody left to answer.
            with contextlib.suppress(RuntimeError):
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
