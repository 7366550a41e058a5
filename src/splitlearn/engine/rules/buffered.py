"""`buffered(k)`: any k gradients make an optimizer step; whoever gave one goes on at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from splitlearn.engine.rules.rule import OpenRound
from splitlearn.errors import SettingError
from splitlearn.vocabulary import CohortSettings


@dataclass(frozen=True, slots=True)
class Buffered:
    """FedBuff (Nguyen et al. 2022): asynchronous members, and the noise of k of them in one step."""

    size: int
    staleness_limit: int
    waits = False
    drops_late = False

    @classmethod
    def of(cls, settings: CohortSettings) -> Buffered:
        """Raises SettingError where the buffer holds nothing."""
        if settings.buffer < 1:
            raise SettingError("a buffered cohort needs a buffer of at least one gradient: set buffer=")
        return cls(settings.buffer, settings.staleness_limit)

    def closes(self, round: OpenRound) -> bool:
        return len(round.arrived) >= self.size

    def closes_at_s(self, round: OpenRound) -> float:
        return math.inf
