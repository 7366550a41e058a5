"""Whom a batch of decode steps waits for: sessions expected back so soon that it is worth it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from splitlearn.engine.ready_step import ReadyStep
from splitlearn.engine.session import Session

REMEMBERED_BATCHES = 3
BATCHES_AWAY = 2
"""After so many batches' time nobody is expected any more."""
WORTH_A_WAIT = 0.02
"""What waiting must save, in batches, to be worth the engine's going to sleep."""


class Away(NamedTuple):
    """A session between an answer and its next step; `pause_s` is what lay between them the last time."""

    since: float
    pause_s: float | None


class Awaited(NamedTuple):
    """So many sessions are worth waiting for, and no longer than this."""

    sessions: int
    within_s: float


class Company:
    """Belongs to the engine's thread; knows no clock but the times that it is told.

    A batch takes about as long whatever its size, and who comes too late for one waits for the whole of it.
    So waiting for k sessions saves each of them a batch, and costs them and those that are ready the wait.
    Who is overdue is expected to take as long again as it is overdue: so each moment makes it less worth it.

    Args:
        wait_ms: how long after its answer a session is waited for; None weighs it at each batch.
    """

    def __init__(self, wait_ms: float | None) -> None:
        self._told_s = None if wait_ms is None else wait_ms / 1000
        self._took_s: deque[float] = deque(maxlen=REMEMBERED_BATCHES)
        self._away: dict[Session, Away] = {}

    def came(self, member: ReadyStep) -> None:
        """A session's next step is here."""
        if member.session is not None:
            away = self._away.pop(member.session, None)
            member.pause_s = None if away is None else max(member.step.arrived_at - away.since, 0.0)

    def ran(self, batch: Iterable[ReadyStep], began: float, now: float) -> None:
        """A batch of decode steps is answered."""
        self._took_s.append(now - began)
        limit_s = self._limit_s
        self._away = {session: away for session, away in self._away.items() if now < away.since + limit_s}
        for member in batch:
            if member.session is not None:
                self._away[member.session] = Away(now, member.pause_s)

    def awaited(self, now: float, ready: int, room: int, joins: Callable[[Session], bool]) -> Awaited | None:
        """Whom the `ready` steps are to wait for; None where nobody is worth it.

        Args:
            now: the time.
            ready: steps.
            room: rows that their batch takes beside them.
            joins: whether a session's steps can run in one batch with them.
        """
        limit_s = self._limit_s
        quick = [
            (session, away.since, away.pause_s)
            for session, away in self._away.items()
            if away.pause_s is not None and away.pause_s < limit_s and joins(session)
        ]
        if self._told_s is not None:
            told = [(since + self._told_s - now, session) for session, since, _ in quick]
            until = _that_fit(room, [each for each in told if each[0] > 0])
            return Awaited(len(until), max(until)) if until else None
        due = [(since + pause_s - now, session) for session, since, pause_s in quick]
        return self._worth_most(_that_fit(room, due), ready)

    def _worth_most(self, due_in_s: list[float], ready: int) -> Awaited | None:
        """Of sessions by when they are due, the first ones that save most; less than 0 is overdue."""
        most_s, found = WORTH_A_WAIT * self._batch_s, None
        for sessions, due_s in enumerate(due_in_s, start=1):
            everybody = ready + sessions
            if (saved_s := sessions * self._batch_s - abs(due_s) * everybody) > most_s:
                # Beyond that time they would cost more than they save.
                most_s, found = saved_s, Awaited(sessions, max(due_s, 0.0) + saved_s / everybody)
        return found

    @property
    def _batch_s(self) -> float:
        # The least: a batch that stalled, or was compiled first, is not to make everybody wait.
        return min(self._took_s, default=0.0)

    @property
    def _limit_s(self) -> float:
        return BATCHES_AWAY * self._batch_s if self._told_s is None else self._told_s


def _that_fit(room: int, due: list[tuple[float, Session]]) -> list[float]:
    """When these sessions are due, the nearest first, as far as their rows fit."""
    fitting = []
    for due_s, session in sorted(due, key=lambda each: abs(each[0])):
        room -= session.rows
        if room < 0:
            break
        fitting.append(due_s)
    return fitting
