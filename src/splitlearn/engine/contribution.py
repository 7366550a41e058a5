"""What one client's microbatches add up to, on the way to an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NO_GRADIENT = -1.0

Microbatch = tuple[int, int]
"""The optimizer step that its forward was for, and its number in it."""
Gradients = list[Tensor | None]
"""One for each of the trunk's trained weights, in their order; None where a weight got none."""


class Contribution:
    """Belongs to the engine's thread."""

    def __init__(self, weights: int) -> None:
        self.gradients: Gradients = [None] * weights
        self._counted: set[Microbatch] = set()

    @property
    def is_empty(self) -> bool:
        return all(gradient is None for gradient in self.gradients)

    def add_once(self, microbatch: Microbatch, gradients: Sequence[Tensor | None], loss_scale: float) -> None:
        """A microbatch whose answer was lost, and is computed again, counts once."""
        if microbatch not in self._counted:
            self.add(gradients, loss_scale)
            self._counted.add(microbatch)

    def has(self, microbatch: Microbatch) -> bool:
        """Whether this microbatch of a step is among what the next optimizer step uses."""
        return microbatch in self._counted

    def add(self, gradients: Sequence[Tensor | None], loss_scale: float = 1.0) -> None:
        """Add a microbatch's gradients, in the order of the weights; the scale is taken out first."""
        # Into a list of its own: where memory ends halfway, nothing has been added.
        self.gradients = [
            _sum(held, gradient, loss_scale) for held, gradient in zip(self.gradients, gradients, strict=True)
        ]

    def norms(self) -> Tensor:
        """The 2-norm of each weight's gradient (n,), as torch clips by them; -1 where there is none."""
        there = [gradient for gradient in self.gradients if gradient is not None]
        norms = iter(torch._foreach_norm(there, 2.0) if there else [])
        absent = torch.tensor(NO_GRADIENT)
        return torch.stack(
            [absent if gradient is None else next(norms).cpu() for gradient in self.gradients]
            or [torch.empty(())]
        )[: len(self.gradients)]

    def scaled(self, scale: float) -> Gradients:
        """Not in place: a step that fails is asked for again."""
        return scaled(self.gradients, scale)

    def forget(self) -> None:
        self.gradients = [None] * len(self.gradients)
        self._counted.clear()


def scaled(gradients: Sequence[Tensor | None], scale: float) -> Gradients:
    """Each times the same factor, as new tensors."""
    return [None if gradient is None else gradient * scale for gradient in gradients]


def _sum(held: Tensor | None, gradient: Tensor | None, loss_scale: float) -> Tensor | None:
    if gradient is None:
        return held
    unscaled = gradient.float() if loss_scale == 1.0 else gradient.float() * (1.0 / loss_scale)
    return unscaled if held is None else held + unscaled
