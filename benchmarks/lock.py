"""How long does a thread wait for Python's lock while an event loop works through many small pieces?

The loop works for 4 ms in pieces of 0.1 ms and sleeps as long; another thread sleeps 1.7 ms at a time, as the
engine's does while it waits for a device or for company. Told is how late it gets on when its time is up
within the work.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable

from _common import markdown, write

SECONDS = 3.0
PIECE_S, WORK_S, SLEEP_S, NAP_S = 100e-6, 4e-3, 4e-3, 1.7e-3
ALWAYS_S = 5e-3
"""Python's own switch interval."""


class Loop:
    """Works in pieces; knows when the work that goes on began."""

    def __init__(self, between: Callable[[], object]) -> None:
        self._between = between
        self.began = 0.0
        self.pieces, self.worked_s = 0, 0.0

    async def run(self) -> None:
        until = time.perf_counter() + SECONDS
        while (now := time.perf_counter()) < until:
            self.began = now
            while time.perf_counter() < self.began + WORK_S:
                _work()
                self._between()
                self.pieces += 1
                await asyncio.sleep(0)
            self.worked_s += time.perf_counter() - self.began
            await asyncio.sleep(SLEEP_S)


def late_ms(between: Callable[[], object], interval_s: float) -> tuple[list[float], float]:
    """How late the other thread got on, sorted; and a piece's time."""
    sys.setswitchinterval(interval_s)
    loop, over, found = Loop(between), threading.Event(), []

    def other() -> None:
        news = threading.Condition()
        while not over.is_set():
            due = time.perf_counter() + NAP_S
            with news:
                news.wait(NAP_S)
            if loop.began <= due < loop.began + WORK_S - 5 * PIECE_S:
                found.append((time.perf_counter() - due) * 1000)

    thread = threading.Thread(target=other)
    thread.start()
    asyncio.run(loop.run())
    over.set()
    thread.join(SECONDS)
    sys.setswitchinterval(ALWAYS_S)
    return sorted(found), loop.worked_s / loop.pieces


def _work() -> None:
    until = time.perf_counter() + PIECE_S
    while time.perf_counter() < until:
        pass


def main() -> None:
    rows = []
    for name, between, interval_s in (
        ("as it is", lambda: None, ALWAYS_S),
        ("switch interval 0.1 ms", lambda: None, 1e-4),
        ("`os.sched_yield()` after each piece", os.sched_yield, ALWAYS_S),
        ("`time.sleep(0)` after each piece", lambda: time.sleep(0), ALWAYS_S),
    ):
        late, piece_s = late_ms(between, interval_s)
        tenth = late[int(0.9 * len(late))]
        rows.append((name, f"{statistics.median(late):.2f}", f"{tenth:.2f}", f"{piece_s * 1e6:.0f}"))
    header = ("the loop", "late by, ms: median", "p90", "a piece, us")
    write("lock", {"rows": rows}, markdown(header, rows))


if __name__ == "__main__":
    main()
