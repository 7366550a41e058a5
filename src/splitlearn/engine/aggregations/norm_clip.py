"""`norm_clip`: no member's gradient is longer than the others' may be; then the mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitlearn.engine import merge
from splitlearn.engine.aggregations.aggregation import Aggregated
from splitlearn.engine.contribution import Gradients
from splitlearn.errors import SettingError
from splitlearn.vocabulary import CohortSettings


@dataclass(frozen=True, slots=True)
class NormClip:
    """Sun et al. 2019 ("Can You Really Backdoor Federated Learning?"), norm thresholding, without noise."""

    member_norm: float
    least = 1
    is_a_vote = False

    @classmethod
    def of(cls, settings: CohortSettings) -> NormClip:
        """Raises SettingError without a norm."""
        if settings.member_norm <= 0:
            raise SettingError(
                "norm_clip has to know how long a member's gradient may be: set member_norm= to a bit more "
                "than an honest member's 2-norm"
            )
        return cls(settings.member_norm)

    def merge(self, each: Sequence[Gradients], shares: Sequence[float]) -> Aggregated:
        let_through = [merge.clip_scale(merge.norm(gradients), self.member_norm) for gradients in each]
        factors = [share * scale for share, scale in zip(shares, let_through, strict=True)]
        return merge.weighted_sum(each, factors), let_through
