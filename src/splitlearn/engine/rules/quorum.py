"""`quorum(k, timeout)`: a round waits for all, but after a while k are enough."""

from __future__ import annotations

import math
from dataclasses import dataclass

from splitlearn.engine.rules.rule import OpenRound
from splitlearn.errors import SettingError
from splitlearn.vocabulary import CohortSettings


@dataclass(frozen=True, slots=True)
class Quorum:
    """The merged gradient is that of the batches which arrived, taken as one."""

    enough: int
    timeout_s: float
    staleness_limit: int
    drops_late: bool
    waits = True

    @classmethod
    def of(cls, settings: CohortSettings) -> Quorum:
        """Raises SettingError where nobody, or more than all, would be enough."""
        if not 1 <= settings.quorum <= settings.members:
            raise SettingError(
                f"a quorum of {settings.quorum} in a cohort of {settings.members}: set quorum= between 1 and "
                f"{settings.members}"
            )
        limit = settings.staleness_limit if settings.carry_late else 0
        return cls(settings.quorum, settings.timeout_s, limit, not settings.carry_late)

    def closes(self, round: OpenRound) -> bool:
        return round.has_all or round.open_s >= self.closes_at_s(round)

    def closes_at_s(self, round: OpenRound) -> float:
        return self.timeout_s if len(round.arrived) >= self.enough else math.inf
