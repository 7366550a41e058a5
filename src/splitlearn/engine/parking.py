"""Members' optimizer steps that are answered later: once their round is closed, and on the disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from splitlearn.engine.member import Member
from splitlearn.engine.step import Step
from splitlearn.errors import RoundUnfinished, SplitLearnError
from splitlearn.vocabulary import Timings
from splitlearn.wire.messages import AnswerMessage

MARGIN_S = 1.0
"""So long before a waiting step's deadline its client is told to ask again."""


class Parking:
    """Belongs to the engine's thread. A member has one step here at most."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[Member, Step[Any]]] = {}

    def park(self, member: Member, step: Step[Any]) -> None:
        """An older one, that asked for the same, is told so now."""
        if (older := self._steps.pop(member.name, None)) is not None:
            older[1].fail(RoundUnfinished("the same step was asked for again"))
        self._steps[member.name] = (member, step)

    def answer(self, answer_of: Callable[[Member, int], AnswerMessage | None]) -> None:
        """All that can be, with the time that they waited."""
        for member, step in tuple(self._steps.values()):
            if (answer := answer_of(member, step.message.key.step)) is not None:
                del self._steps[member.name]
                queued_us = int((time.monotonic() - step.arrived_at) * 1e6)
                step.answer(replace(answer, timings=Timings(queued_us=queued_us)))

    def fail(self, error: SplitLearnError, which: Callable[[Member, Step[Any]], bool]) -> None:
        for member, step in tuple(self._steps.values()):
            if which(member, step):
                del self._steps[member.name]
                step.fail(error.again())

    def fail_late(self, now: float, why: Callable[[], str]) -> None:
        """Those whose clients would give up soon are told to ask again."""
        if self.due_at <= now:
            late = RoundUnfinished(why())
            self.fail(late, lambda member, step: step.deadline - MARGIN_S <= now)

    @property
    def due_at(self) -> float:
        return min((step.deadline - MARGIN_S for _, step in self._steps.values()), default=math.inf)
