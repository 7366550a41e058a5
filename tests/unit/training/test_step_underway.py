"""A cohort's step is weighted by what its settings say, over all of its microbatches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from splitlearn.training.step_underway import StepUnderway
from splitlearn.vocabulary import CohortSettings, Fate, Merged

FIRST, SECOND = torch.tensor([[5, 6, -100], [-100, 7, 8]]), torch.tensor([[-100, 9, 4]])
"""Three rows; 3 and 2 of their tokens are predicted from one before them."""


class Trunk:
    """Takes whatever is given, and notes with what weight."""

    def __init__(self, weighting: str) -> None:
        cohort = CohortSettings("sync", weighting=weighting)
        self.planned = SimpleNamespace(settings=SimpleNamespace(cohort=cohort))
        self.weights: list[float] = []

    def step(self, learning_rate: float, weight: float) -> Merged:
        self.weights.append(weight)
        return Merged(Fate.MERGED)


@pytest.mark.parametrize(
    ("weighting", "items", "expected"),
    [
        ("tokens", None, 5.0),
        ("tokens", 12, 12.0),
        ("examples", None, 3.0),
        ("examples", 12, 3.0),
        ("equal", 12, 1.0),
    ],
)
def test_a_step_stands_for_its_tokens_its_examples_or_itself(weighting, items, expected):
    """`items` is what the trainer divided the losses by, where it did."""
    trunk: Any = Trunk(weighting)
    underway = StepUnderway(nn.Linear(1, 1), trunk)
    for labels in (FIRST, SECOND):
        underway.train(
            lambda model, inputs, items: torch.zeros(()), nn.Linear(1, 1), {"labels": labels}, items
        )
    assert underway.give(1e-3, clip=lambda: None)
    assert trunk.weights == [expected]
