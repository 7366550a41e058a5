"""`sync`: a round is closed when every member that is there has given; nobody goes on before."""

from __future__ import annotations

import math

from splitlearn.engine.rules.rule import OpenRound


class Sync:
    """Merged, they are the gradient of the members' batches taken as one."""

    waits = True
    staleness_limit = 0
    drops_late = False

    def closes(self, round: OpenRound) -> bool:
        return round.has_all

    def closes_at_s(self, round: OpenRound) -> float:
        return math.inf
