"""What is waiting for company worth? A model of the queue: the engine's rule, told times that are made up.

Sessions of one row step as fast as their answers come. One event loop takes their messages in and sends the
answers, one after another in any order; a batch takes its time, whatever else goes on; now and then a step
goes astray for up to a batch. The rule is the engine's own.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from itertools import count
from typing import Any

from _common import markdown, write

from splitlearn.engine.company import Company
from splitlearn.engine.ready_step import ReadyStep
from splitlearn.engine.session import Session
from splitlearn.engine.step import Step
from splitlearn.vocabulary import Precision, StepKey
from splitlearn.wire.messages import StepMessage

SECONDS = 3.0
ROOM = 64
SESSIONS = (1, 2, 4, 8, 20, 32)
ASTRAY = 0.03
"""Share of the steps."""


@dataclass(frozen=True, slots=True)
class Case:
    """Seconds: of a batch, each row more, a message through the event loop, a client between two steps."""

    name: str
    batch_s: float
    row_s: float
    message_s: float
    pause_s: float


CASES = (
    Case("H100, 8B, load generator", 6.0e-3, 0.03e-3, 0.13e-3, 0.7e-3),
    Case("the same, dearer host", 6.0e-3, 0.03e-3, 0.2e-3, 1.0e-3),
    Case("H100, 8B, clients on that GPU", 6.2e-3, 0.0, 0.3e-3, 6.0e-3),
    Case("CPU, SmolLM2", 50e-3, 3e-3, 0.5e-3, 1.0e-3),
)


class Queue:
    """Events in the order of their times, and the engine that they meet."""

    def __init__(self, case: Case, sessions: int, *, waits: bool) -> None:
        self._case = case
        self._company = Company(None if waits else 0)
        self._random = random.Random(0)
        self._numbers = count()
        self._events: list[tuple[float, int, str, Any]] = []
        self._loop_free_at = self._wake_at = 0.0
        self._ready: list[ReadyStep] = []
        self._runs, self._wanted = False, 0
        self.answered, self.busy_s, self.batches = 0, 0.0, 0
        for number in range(sessions):
            session = Session((b"", number), 0, Precision(), (number,), 0.0)
            self._at(self._random.random() * case.batch_s, "sent", session)

    def run(self) -> None:
        while self._events and self._events[0][0] < SECONDS:
            now, _, what, about = heapq.heappop(self._events)
            getattr(self, f"_{what}")(now, about)

    def _at(self, when: float, what: str, about: Any) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what, about))

    def _through_the_loop(self, now: float) -> float:
        self._loop_free_at = max(self._loop_free_at, now) + self._case.message_s
        return self._loop_free_at

    def _sent(self, now: float, session: Session) -> None:
        self._at(self._through_the_loop(now), "came", session)

    def _came(self, now: float, session: Session) -> None:
        member = ReadyStep(Step(b"", StepMessage(StepKey(step=1), None), arrived_at=now), session)
        self._company.came(member)
        self._ready.append(member)
        if len(self._ready) >= self._wanted:
            self._choose(now)

    def _woken(self, now: float, at: float) -> None:
        if at == self._wake_at:
            self._choose(now)

    def _choose(self, now: float) -> None:
        if self._runs or not self._ready:
            return
        ready = len(self._ready)
        awaited = self._company.awaited(now, ready, ROOM - ready, lambda session: True)
        if awaited is not None:
            self._wanted = ready + awaited.sessions
            self._wake_at = now + awaited.within_s
            self._at(self._wake_at, "woken", self._wake_at)
            return
        batch, self._ready, self._runs, self._wanted = self._ready, [], True, 0
        took_s = self._case.batch_s + self._case.row_s * len(batch)
        self.busy_s += took_s
        self.batches += 1
        self._at(now + took_s, "done", (batch, now))

    def _done(self, now: float, about: tuple[list[ReadyStep], float]) -> None:
        batch, began = about
        self._runs = False
        self._company.ran(batch, began, now)
        self._random.shuffle(batch)
        for member in batch:
            pause_s = self._case.pause_s * (1 + 0.3 * self._random.random())
            if self._random.random() < ASTRAY:
                pause_s += self._case.batch_s * self._random.random()
            self._at(self._through_the_loop(now) + pause_s, "sent", member.session)
        self.answered += len(batch)
        self._choose(now)


def cells(case: Case, sessions: int) -> tuple[object, ...]:
    found = [Queue(case, sessions, waits=waits) for waits in (False, True)]
    for queue in found:
        queue.run()
    at_once, waiting = found
    return (
        case.name,
        sessions,
        *(f"{queue.answered / SECONDS:.0f}" for queue in found),
        f"{waiting.answered / at_once.answered:.2f}",
        f"{waiting.answered / waiting.batches:.1f}",
        f"{min(waiting.busy_s / SECONDS, 1):.0%}",
    )


def main() -> None:
    rows = [cells(case, sessions) for case in CASES for sessions in SESSIONS]
    header = ("case", "sessions", "steps/s at once", "waiting", "ratio", "steps a batch", "device busy")
    write("waiting", {"rows": rows}, markdown(header, rows) + "\n\nMade-up times, no machine: a model.")


if __name__ == "__main__":
    main()
