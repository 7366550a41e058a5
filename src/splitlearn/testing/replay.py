"""A cohort's training again, in one process, by its ledger alone: the same adapters come out bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from splitlearn.engine import merge
from splitlearn.engine.aggregations import aggregation_of
from splitlearn.engine.contribution import Gradients, scaled
from splitlearn.engine.ledger import rounds
from splitlearn.engine.run import Run
from splitlearn.engine.trunk_state import AdapterVersion
from splitlearn.monitor.events import Event, RoundClosed

GradientsOf = Callable[[str, int, AdapterVersion], Gradients]
"""What a member's step gave at a version of the adapter, before anything was scaled."""


def replay(events: Iterable[Event], run: Run, gradients_of: GradientsOf) -> None:
    """Have the run, as it was before its first round, step as the ledger says.

    Raises:
        ValueError: the ledger's rounds are not numbered one after another, each once; or of a member's
            gradients more or less is let through than it says.
    """
    settings = run.settings.cohort
    aggregation = aggregation_of(settings)
    versions = {run.version: run.current}
    for closed in rounds(events):
        if closed.round != run.step + 1:
            raise ValueError(f"round {closed.round} follows round {run.step} in the ledger")
        means = [_mean(closed, place, versions, gradients_of) for place in range(len(closed.parts))]
        merged, let_through = aggregation.merge(means, [part.coefficient for part in closed.parts])
        if let_through != [part.let_through for part in closed.parts]:
            raise ValueError(f"round {closed.round} let other gradients through than the ledger says")
        merged, _, _ = merge.clip(merged, settings.clip_norm)
        run.step_with(merged, closed.learning_rate)
        versions[run.version] = run.current


def _mean(
    closed: RoundClosed, place: int, versions: dict[int, AdapterVersion], gradients_of: GradientsOf
) -> Gradients:
    part = closed.parts[place]
    return scaled(gradients_of(part.member, part.step, versions[part.version]), part.scale)
