"""`trimmed_mean`: of each coordinate the mean of the members' values but the outermost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitlearn.engine.aggregations.aggregation import Aggregated, byzantine_of
from splitlearn.engine.aggregations.ordered import middle
from splitlearn.engine.contribution import Gradients
from splitlearn.vocabulary import CohortSettings


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """Yin et al. 2018, definition 2: `byzantine` values are cut from either end."""

    byzantine: int
    is_a_vote = True

    @classmethod
    def of(cls, settings: CohortSettings) -> TrimmedMean:
        """Raises SettingError where nobody has said how many members may be false."""
        return cls(byzantine_of(settings))

    @property
    def least(self) -> int:
        return 2 * self.byzantine + 1

    def merge(self, each: Sequence[Gradients], shares: Sequence[float]) -> Aggregated:
        return middle(each, self.byzantine, shares), [1.0] * len(each)
