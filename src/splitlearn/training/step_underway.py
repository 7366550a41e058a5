"""A cohort's step as it is computed: its batches are kept until the trunk has it, to begin anew from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.errors import ContributionLost, StaleGradient
from splitlearn.training.evaluation import learned_tokens
from splitlearn.vocabulary import Fate

AGAIN = (ContributionLost, StaleGradient)
TRIES = 5
Result = TypeVar("Result")
TrainingStep = Callable[..., Tensor]
log = logging.getLogger("splitlearn")


class StepUnderway:
    """The microbatches of one optimizer step, and the random numbers that it began with."""

    def __init__(self, model: nn.Module, trunk: RemoteTrunk) -> None:
        self._model, self._trunk = model, trunk
        self._batches: list[tuple[dict[str, Any], Any]] = []
        self._state: Tensor | None = None
        self._step: TrainingStep | None = None

    def train(
        self, step: TrainingStep, model: nn.Module, inputs: dict[str, Any], items: Any = None
    ) -> Tensor:
        """One microbatch forward and backward; its loss."""
        if not self._batches:
            self._state = torch.get_rng_state()
        self._batches.append((dict(inputs), items))
        self._step, self._model = step, model
        try:
            return step(model, inputs, items)
        except AGAIN as error:
            return self._compute_again(error)

    def retrying(self, ask: Callable[[], Result], clip: Callable[[], None] = lambda: None) -> Result:
        """Its answer, with the step computed again, and then clipped, where the trunk no longer has it."""
        for tries_left in reversed(range(TRIES)):
            try:
                return ask()
            except AGAIN as error:
                if not tries_left:
                    raise
                self._compute_again(error)
                clip()
        raise AssertionError("the last try returns or raises")

    def give(self, learning_rate: float, clip: Callable[[], None]) -> bool:
        """Have the trunk take what was accumulated; whether it counts, or was dropped.

        `clip` is called for gradients that were computed again.

        Raises:
            StaleGradient, ContributionLost: again and again.
        """
        merged = self.retrying(
            lambda: self._trunk.step(learning_rate=learning_rate, weight=self._weight()), clip
        )
        self.forget()
        return merged is None or merged.fate is not Fate.DROPPED

    def forget(self) -> None:
        """The trunk has it, or it is dropped."""
        self._batches, self._state = [], None

    def _weight(self) -> float:
        """What the gradients, a mean over this step's batches, stand for in the cohort."""
        planned = self._trunk.planned
        weighting = planned.settings.cohort.weighting if planned is not None else ""
        if weighting == "equal" or not self._batches:
            return 1.0
        if weighting == "examples":
            return float(sum(len(inputs["labels"]) for inputs, _ in self._batches))
        items = self._batches[0][1]
        # What the library divided the sum of the losses by, where it did.
        if items is not None:
            return float(items)
        return float(sum(learned_tokens(inputs["labels"]) for inputs, _ in self._batches))

    def _compute_again(self, error: Exception) -> Tensor:
        """All microbatches so far, with the random numbers that they had; the last one's loss."""
        log.warning("a step is computed again: %s", error)
        assert self._step is not None
        assert self._state is not None
        for tries_left in reversed(range(TRIES)):
            self._model.zero_grad(set_to_none=True)
            torch.set_rng_state(self._state)
            try:
                losses = [self._step(self._model, dict(inputs), items) for inputs, items in self._batches]
            except AGAIN:
                if not tries_left:
                    raise
            else:
                return losses[-1]
        raise AssertionError("the last try returns or raises")
