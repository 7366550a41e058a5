"""How long things took, as percentiles, in little memory however many there were."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

WIDTH = 1.01
"""How many times as late a class of durations ends as it begins: percentiles are off by half a hundredth."""
SHORTEST_S = 1e-9


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Milliseconds within which half, 95 and 99 of a hundred were done; 0 where there were none."""

    p50_ms: float
    p95_ms: float
    p99_ms: float


class Latencies:
    """Durations, counted in classes; those of several processes can be added up."""

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts = Counter(counts or {})

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Latencies:
        noted = cls()
        for each in seconds:
            noted.note(each)
        return noted

    def __len__(self) -> int:
        return self.counts.total()

    def note(self, seconds: float) -> None:
        self.counts[_class_of(seconds)] += 1

    def add(self, others: Latencies) -> None:
        self.counts.update(others.counts)

    def within_s(self, share: float) -> float:
        """The time within which this share of them was done."""
        left = math.ceil(share * len(self))
        for number, count in sorted(self.counts.items()):
            left -= count
            if left <= 0:
                return _middle_of(number)
        return 0.0

    def percentiles(self) -> Percentiles:
        return Percentiles(*(self.within_s(share) * 1000 for share in (0.50, 0.95, 0.99)))


def _class_of(seconds: float) -> int:
    return math.floor(math.log(max(seconds, SHORTEST_S), WIDTH))


def _middle_of(number: int) -> float:
    return float(WIDTH ** (number + 0.5))
