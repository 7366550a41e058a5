"""How many steps the trunk ran together, told from its answers: those of one batch name one device time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

TOGETHER_S = 0.25
"""Answers of one batch arrive within this time."""


class Answered(NamedTuple):
    """One answer: when it came (the machine's clock), to which session, and the device time that it names."""

    at_s: float
    session: int
    device_us: int


@dataclass(slots=True)
class _Batch:
    began_s: float
    sessions: set[int]


def steps_per_batch(answers: Iterable[Answered]) -> float:
    """The mean; 0 where nothing was answered. A session has at most one step in a batch."""
    steps = batches = 0
    latest: dict[int, _Batch] = {}
    for at_s, session, device_us in sorted(answers):
        steps += 1
        batch = latest.get(device_us)
        if batch is None or at_s - batch.began_s > TOGETHER_S or session in batch.sessions:
            batches += 1
            batch = latest[device_us] = _Batch(at_s, set())
        batch.sessions.add(session)
    return steps / batches if batches else 0.0
