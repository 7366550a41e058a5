"""One round of a cohort: the gradients that were offered become one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from splitlearn.engine import aggregations, merge
from splitlearn.engine.offers import Offer
from splitlearn.monitor.events import Part, RoundClosed

if TYPE_CHECKING:
    from splitlearn.engine.run import Run


def close(run: Run, waiting: Sequence[Offer]) -> RoundClosed:
    """Merge, clip, and step the run; what was done, for the ledger.

    They are merged by name, and not as they came: the same gradients then give the same bits.

    Raises:
        RunBroken: the optimizer failed halfway.
    """
    settings = run.settings.cohort
    offers = sorted(waiting, key=lambda each: (each.member, each.step))
    staleness = [run.version - each.version for each in offers]
    weights = [each.weight for each in offers]
    shares = aggregations.shares(settings, weights, staleness)
    rate = aggregations.learning_rate(settings, [each.learning_rate for each in offers], weights)
    aggregation = aggregations.aggregation_of(settings)
    merged, let_through = aggregation.merge([each.gradients for each in offers], shares)
    merged, norm, clip_scale = merge.clip(merged, settings.clip_norm)
    run.step_with(merged, rate)
    parts = tuple(
        Part(each.member, each.incarnation, each.step, each.version, each.weight, each.scale, share, s, let)
        for each, share, s, let in zip(offers, shares, staleness, let_through, strict=True)
    )
    return RoundClosed(run.step, run.version, rate, norm, clip_scale, parts)
