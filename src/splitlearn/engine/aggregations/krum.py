"""`krum`: the one gradient that has the most others near it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitlearn.engine import merge
from splitlearn.engine.aggregations.aggregation import Aggregated, byzantine_of
from splitlearn.engine.aggregations.ordered import weights
from splitlearn.engine.contribution import Gradients
from splitlearn.vocabulary import CohortSettings


@dataclass(frozen=True, slots=True)
class Krum:
    """Blanchard et al. 2017: the least sum of squared distances to its n - f - 2 nearest.

    Of two that are as good, the first in the order given.
    """

    byzantine: int
    is_a_vote = True

    @classmethod
    def of(cls, settings: CohortSettings) -> Krum:
        """Raises SettingError where nobody has said how many members may be false."""
        return cls(byzantine_of(settings))

    @property
    def least(self) -> int:
        return 2 * self.byzantine + 3

    def merge(self, each: Sequence[Gradients], shares: Sequence[float]) -> Aggregated:
        chosen = self.choose(each)
        # It stands for all of them: its own share times their number, which is what staleness left of it.
        only = merge.weighted_sum([each[chosen]], [shares[chosen] * len(each)])
        return only, [float(place == chosen) for place in range(len(each))]

    def choose(self, each: Sequence[Gradients]) -> int:
        """Which of them it is."""
        # A member is its own nearest, at 0.
        near = squared_distances(each).sort(dim=1).values[:, 1 : len(each) - self.byzantine - 1]
        return min(range(len(each)), key=near.sum(dim=1).tolist().__getitem__)


def squared_distances(each: Sequence[Gradients]) -> Tensor:
    """Of each two members' gradients (N, N), added up in float64 weight by weight."""
    total = torch.zeros(len(each), len(each), dtype=torch.float64)
    for there in weights(each):
        if there is not None:
            total += _squared_distances(torch.stack(there).flatten(start_dim=1)).cpu()
    return total


def _squared_distances(rows: Tensor) -> Tensor:
    apart = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for place in range(len(rows) - 1):
        # Of weights beyond a norm of 1e19 it is infinite, and such a member is never chosen.
        norms = torch.linalg.vector_norm(rows[place + 1 :] - rows[place], dim=1)
        apart[place, place + 1 :] = norms.double().square()
    return apart + apart.T
