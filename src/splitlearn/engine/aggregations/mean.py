"""`mean`: the members' gradients by their shares. Whoever is in the round may move it anywhere."""

from __future__ import annotations

from collections.abc import Sequence

from splitlearn.engine import merge
from splitlearn.engine.aggregations.aggregation import Aggregated
from splitlearn.engine.contribution import Gradients


class Mean:
    """FedSGD (McMahan et al. 2017)."""

    least = 1
    is_a_vote = False

    def merge(self, each: Sequence[Gradients], shares: Sequence[float]) -> Aggregated:
        return merge.weighted_sum(each, shares), [1.0] * len(each)
