"""`median`: of each coordinate the members' middle value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitlearn.engine.aggregations.aggregation import Aggregated, byzantine_of
from splitlearn.engine.aggregations.ordered import middle
from splitlearn.engine.contribution import Gradients
from splitlearn.vocabulary import CohortSettings


@dataclass(frozen=True, slots=True)
class Median:
    """Yin et al. 2018, definition 1; of an even number of members the mean of the two in the middle."""

    byzantine: int
    is_a_vote = True

    @classmethod
    def of(cls, settings: CohortSettings) -> Median:
        """Raises SettingError where nobody has said how many members may be false."""
        return cls(byzantine_of(settings))

    @property
    def least(self) -> int:
        return 2 * self.byzantine + 1

    def merge(self, each: Sequence[Gradients], shares: Sequence[float]) -> Aggregated:
        return middle(each, (len(each) - 1) // 2, shares), [1.0] * len(each)
