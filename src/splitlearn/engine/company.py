"""Whom a batch of decode steps waits for: sessions expected back so soon that it is worth it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from splitlearn.engine.ready_step import ReadyStep
from splitlearn.engine.session import Session

REMEMBERED_BATCHES = 3
SLACK = 1.5
"""How much longer than the last time a session may take before nobody expects it."""


class Away(NamedTuple):
    """A session between an answer and its next step; `pause_s` is what lay between them the last time."""

    since: float
    pause_s: float | None


class Awaited(NamedTuple):
    """So many sessions are expected within this time."""

    sessions: int
    within_s: float


class Company:
    """Belongs to the engine's thread; knows no clock but the times that it is told.

    A batch takes about as long whatever its size, and who comes too late for one waits for the whole of it.
    So waiting for k sessions saves each of them a batch, and costs them and those that are ready the wait.

    Args:
        wait_ms: how long after its answer a session is waited for; None weighs it at each batch.
    """

    def __init__(self, wait_ms: float | None) -> None:
        self._told_s = None if wait_ms is None else wait_ms / 1000
        self._took_s: deque[float] = deque(maxlen=REMEMBERED_BATCHES)
        self._away: dict[Session, Away] = {}

    @property
    def patience_s(self) -> float:
        """After so long nobody is expected."""
        if self._told_s is not None:
            return self._told_s
        # The least: a batch that stalled, or was compiled first, is not to make everybody wait.
        return min(self._took_s, default=0.0)

    def came(self, member: ReadyStep) -> None:
        """A session's next step is here."""
        if member.session is not None:
            away = self._away.pop(member.session, None)
            member.pause_s = None if away is None else max(member.step.arrived_at - away.since, 0.0)

    def ran(self, batch: Iterable[ReadyStep], began: float, now: float) -> None:
        """A batch of decode steps is answered."""
        self._took_s.append(now - began)
        patience_s = self.patience_s
        self._away = {session: away for session, away in self._away.items() if now < away.since + patience_s}
        for member in batch:
            if member.session is not None:
                self._away[member.session] = Away(now, member.pause_s)

    def awaited(self, now: float, ready: int) -> Awaited | None:
        """Whom the `ready` steps are to wait for; None where nobody is worth it."""
        due = sorted(at for away in self._away.values() if (at := self._due(away)) is not None and now < at)
        if not due:
            return None
        if self._told_s is not None:
            return Awaited(len(due), due[-1] - now)
        took_s = self.patience_s
        saved_s = [
            sessions * took_s - (at - now) * (ready + sessions) for sessions, at in enumerate(due, start=1)
        ]
        most = max(saved_s)
        sessions = saved_s.index(most) + 1
        return Awaited(sessions, due[sessions - 1] - now) if most > 0 else None

    def _due(self, away: Away) -> float | None:
        """When its next step is here at the latest; None where it is not expected soon."""
        patience_s = self.patience_s
        if away.pause_s is None or away.pause_s >= patience_s:
            return None
        return away.since + (patience_s if self._told_s is not None else SLACK * away.pause_s)
