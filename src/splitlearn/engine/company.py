"""Whom a batch of decode steps waits for: sessions that were just answered and are quick to come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from splitlearn.engine.ready_step import ReadyStep
from splitlearn.engine.session import Session

SHARE_OF_A_BATCH = 0.5
REMEMBERED_BATCHES = 3


class Away(NamedTuple):
    """A session between an answer and its next step."""

    since: float
    is_quick: bool


class Awaited(NamedTuple):
    """So many sessions are expected within this time."""

    sessions: int
    within_s: float


class Company:
    """Belongs to the engine's thread; knows no clock but the times that it is told.

    A batch takes about as long whatever its size, so two groups of sessions that take turns are half as
    fast as one; waiting for less than a batch takes joins them. A session is waited for if its last step
    came so soon: others are far away, busy or gone.

    Args:
        wait_ms: how long after its answer a session is waited for; None learns it from the batches.
    """

    def __init__(self, wait_ms: float | None) -> None:
        self._told_s = None if wait_ms is None else wait_ms / 1000
        self._took_s: deque[float] = deque(maxlen=REMEMBERED_BATCHES)
        self._away: dict[Session, Away] = {}

    @property
    def patience_s(self) -> float:
        if self._told_s is not None:
            return self._told_s
        # The least: a batch that stalled, or was compiled first, is not to make everybody wait.
        return SHARE_OF_A_BATCH * min(self._took_s, default=0.0)

    def came(self, member: ReadyStep) -> None:
        """A session's next step is here."""
        if member.session is not None:
            away = self._away.pop(member.session, None)
            member.is_quick = away is not None and self._is_expected(away, member.step.arrived_at)

    def ran(self, batch: Iterable[ReadyStep], began: float, now: float) -> None:
        """A batch of decode steps is answered."""
        self._took_s.append(now - began)
        self._away = {session: away for session, away in self._away.items() if self._is_expected(away, now)}
        for member in batch:
            if member.session is not None:
                self._away[member.session] = Away(now, member.is_quick)

    def awaited(self, now: float) -> Awaited | None:
        """None where nobody is."""
        since = [away.since for away in self._away.values() if away.is_quick and self._is_expected(away, now)]
        return Awaited(len(since), max(since) + self.patience_s - now) if since else None

    def _is_expected(self, away: Away, now: float) -> bool:
        return now < away.since + self.patience_s
