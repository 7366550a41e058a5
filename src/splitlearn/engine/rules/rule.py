"""What a rule sees of a round, and what it says."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class OpenRound:
    """Who has given gradients that wait (`arrived`, in order), and who is there to give some (`awaited`).

    `open_s` are the seconds since the first of them came; `is_complete` is whether as many members have
    joined as the run was opened for.
    """

    arrived: tuple[str, ...]
    awaited: Collection[str]
    open_s: float
    is_complete: bool = True

    @property
    def has_all(self) -> bool:
        """Everybody who is there has given, and everybody who was expected has been there."""
        return bool(self.arrived) and self.is_complete and set(self.awaited) <= set(self.arrived)


class Rule(Protocol):
    """Plain values in, a decision out: no clock, no tensor."""

    @property
    def waits(self) -> bool:
        """Whether a member is answered only when its round is closed."""

    @property
    def staleness_limit(self) -> int:
        """Versions between a forward and its round above which gradients are refused, and computed again."""

    @property
    def drops_late(self) -> bool:
        """Whether what comes after its round is dropped, and its member goes on."""

    def closes(self, round: OpenRound) -> bool:
        """Whether the gradients that wait make one optimizer step now."""
        ...

    def closes_at_s(self, round: OpenRound) -> float:
        """At which `open_s` to ask again, if nothing else happens; infinite where only arrivals matter."""
        ...
