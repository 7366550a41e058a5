"""How a round's gradients become one: a file an aggregation, by the names that settings have for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from splitlearn.engine import merge
from splitlearn.engine.aggregations.aggregation import Aggregation
from splitlearn.engine.aggregations.krum import Krum
from splitlearn.engine.aggregations.mean import Mean
from splitlearn.engine.aggregations.median import Median
from splitlearn.engine.aggregations.norm_clip import NormClip
from splitlearn.engine.aggregations.trimmed_mean import TrimmedMean
from splitlearn.errors import SettingError
from splitlearn.vocabulary import CohortSettings

AGGREGATIONS: Mapping[str, Callable[[CohortSettings], Aggregation]] = {
    "mean": lambda settings: Mean(),
    "norm_clip": NormClip.of,
    "median": Median.of,
    "trimmed_mean": TrimmedMean.of,
    "krum": Krum.of,
}
ONE_VOTE_EACH = ("sync", "quorum")
"""Rules under which nobody gives two gradients to one round."""
FIGURES: Mapping[str, tuple[str, ...]] = {
    "member_norm": ("norm_clip",),
    "byzantine": ("median", "trimmed_mean", "krum"),
    "max_weight": ("mean", "norm_clip"),
}
"""Which aggregations each figure is for."""

__all__ = ["AGGREGATIONS", "Aggregation", "aggregation_of", "learning_rate", "require_known", "shares"]


def aggregation_of(settings: CohortSettings) -> Aggregation:
    """Raises SettingError where there is no such aggregation, or one of its figures is missing."""
    if settings.aggregation not in AGGREGATIONS:
        raise SettingError(
            f"there is no aggregation {settings.aggregation!r}: use one of {', '.join(AGGREGATIONS)}"
        )
    return AGGREGATIONS[settings.aggregation](settings)


def require_known(settings: CohortSettings) -> None:
    """Raises SettingError where rounds of this cohort could not be aggregated as it says."""
    if settings.is_private:
        return
    aggregation = aggregation_of(settings)
    for figure, wanted_by in FIGURES.items():
        if getattr(settings, figure) and settings.aggregation not in wanted_by:
            raise SettingError(
                f"{figure}= is for aggregation {' or '.join(wanted_by)}: leave it out, or set aggregation="
            )
    if aggregation.is_a_vote:
        _require_votes(settings, aggregation.least)
    _require_rate(settings)


def _require_rate(settings: CohortSettings) -> None:
    is_one_of_many = settings.rule in ONE_VOTE_EACH
    if settings.aggregation == "norm_clip" and not is_one_of_many and not settings.max_rate:
        raise SettingError(
            f"in {settings.rule} one member alone states a round's learning rate, which makes long steps of "
            "short gradients: set max_rate= to the highest rate that members use"
        )


def _require_votes(settings: CohortSettings, least: int) -> None:
    if settings.rule not in ONE_VOTE_EACH:
        raise SettingError(
            f"{settings.aggregation} gives each member one vote a round, {settings.rule} does not: use rule "
            "'sync', or 'quorum' (with carry_late=True and timeout_s=0 nobody waits for more than enough)"
        )
    figure = "members" if settings.rule == "sync" else "quorum"
    if getattr(settings, figure) < least:
        raise SettingError(
            f"{settings.aggregation} with byzantine={settings.byzantine} needs {least} gradients a round, "
            f"{figure}={getattr(settings, figure)} promises fewer: raise it, or lower byzantine="
        )


def shares(settings: CohortSettings, weights: Sequence[float], staleness: Sequence[int]) -> list[float]:
    """What each member's gradient counts before it is looked at; together at most 1.

    Where all vote alike, what a member says of its own weight is not heard.
    """
    if settings.weighting == "equal" or aggregation_of(settings).is_a_vote:
        weights = [1.0] * len(weights)
    elif settings.max_weight:
        weights = [min(weight, settings.max_weight) for weight in weights]
    return merge.coefficients(weights, staleness, settings.staleness_exponent)


def learning_rate(settings: CohortSettings, rates: Sequence[float], weights: Sequence[float]) -> float:
    """The round's: as `merge.learning_rate` under the plain mean, else the lower median of the members'.

    A member states its own rate, and a mean of them would let one member scale everybody's step. At most
    `max_rate`, where one is set.
    """
    if settings.aggregation == "mean":
        rate = merge.learning_rate(rates, weights)
    else:
        rate = sorted(rates)[(len(rates) - 1) // 2]
    return min(rate, settings.max_rate or rate)
