"""The members' values of each coordinate, in order of size: what is left of them without the outermost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from splitlearn.engine.contribution import Gradients

Pick = Callable[[Tensor, Tensor], Tensor]


def middle(each: Sequence[Gradients], cut: int, shares: Sequence[float]) -> Gradients:
    """The mean of each coordinate's values but the `cut` smallest and largest, times all shares together.

    Weight by weight: what it takes is a copy of the members' gradients of one weight.
    """
    factor = math.fsum(shares)
    return [None if there is None else _middle(there, cut) * factor for there in weights(each)]


def weights(each: Sequence[Gradients]) -> Iterator[list[Tensor] | None]:
    """The members' gradients of one weight after the other; None where nobody has any.

    Who has none where others have some gave zeros: the weight had no part in its batch.
    """
    for gradients in zip(*each, strict=True):
        there = next((gradient for gradient in gradients if gradient is not None), None)
        if there is None:
            yield None
        else:
            yield [torch.zeros_like(there) if gradient is None else gradient for gradient in gradients]


def _middle(values: list[Tensor], cut: int) -> Tensor:
    for _ in range(cut):
        values = _without_extreme(values, torch.maximum, torch.minimum)
        values = _without_extreme(values, torch.minimum, torch.maximum)
    # One after the other: the order of a sum over a dimension is the device's own affair.
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total / len(values)


def _without_extreme(values: list[Tensor], extreme: Pick, other: Pick) -> list[Tensor]:
    """One fewer: of each coordinate the extreme one is carried along, and left out in the end.

    Several times faster than `torch.sort` over so few values, and without its indices.
    """
    carried, kept = values[0], []
    for value in values[1:]:
        kept.append(other(carried, value))
        carried = extreme(carried, value)
    return kept
