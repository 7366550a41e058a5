"""What an aggregation sees of a round, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from splitlearn.engine.contribution import Gradients
from splitlearn.errors import SettingError
from splitlearn.vocabulary import CohortSettings

Aggregated = tuple[Gradients, list[float]]
"""The round's gradient, and how much of each member's was let through: 1 all of it, 0 nothing."""


class Aggregation(Protocol):
    """Pure: the same gradients in the same order give the same bits."""

    @property
    def least(self) -> int:
        """With fewer members a round is not closed: it would protect from nobody."""

    @property
    def is_a_vote(self) -> bool:
        """Whether each member counts alike, whatever weight it states."""

    def merge(self, each: Sequence[Gradients], shares: Sequence[float]) -> Aggregated:
        """One gradient of all.

        Args:
            each: the members' gradients, one a weight; None counts as zeros where others have some.
            shares: what each counts, staleness taken off; together at most 1.
        """
        ...


def byzantine_of(settings: CohortSettings) -> int:
    """Raises SettingError where nobody has said how many members may be false."""
    if settings.byzantine < 1:
        raise SettingError(
            f"{settings.aggregation} has to know how many members may be false: set byzantine= to 1 or more"
        )
    return settings.byzantine
