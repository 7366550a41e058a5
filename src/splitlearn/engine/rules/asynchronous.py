"""`async`: each member's gradients are an optimizer step by themselves, the less the older they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from splitlearn.engine.rules.rule import OpenRound
from splitlearn.vocabulary import CohortSettings


@dataclass(frozen=True, slots=True)
class Asynchronous:
    """Xie et al. 2019, with their polynomial weight on the gradient."""

    staleness_limit: int
    waits = True
    drops_late = False

    @classmethod
    def of(cls, settings: CohortSettings) -> Asynchronous:
        return cls(settings.staleness_limit)

    def closes(self, round: OpenRound) -> bool:
        return bool(round.arrived)

    def closes_at_s(self, round: OpenRound) -> float:
        return math.inf
