"""The members' values of each coordinate, in order of size: what is left of them without the outermost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from splitlearn.engine.contribution import Gradients

# N members


def middle(each: Sequence[Gradients], cut: int, shares: Sequence[float]) -> Gradients:
    """The mean of each coordinate's values but the `cut` smallest and largest, times all shares together.

    Weight by weight: what it takes is some copies of the members' gradients of one weight.
    """
    factor = math.fsum(shares)
    return [None if rows is None else _middle(rows, cut) * factor for rows in weights(each)]


def weights(each: Sequence[Gradients]) -> Iterator[Tensor | None]:
    """The members' gradients (N, ...) of one weight after the other; None where nobody has any.

    Who has none where others have some gave zeros: the weight had no part in its batch.
    """
    for gradients in zip(*each, strict=True):
        there = next((gradient for gradient in gradients if gradient is not None), None)
        if there is None:
            yield None
        else:
            yield torch.stack(
                [torch.zeros_like(there) if gradient is None else gradient for gradient in gradients]
            )


def _middle(rows: Tensor, cut: int) -> Tensor:
    kept = torch.sort(rows, dim=0, stable=True).values[cut : len(rows) - cut]
    # One after the other: the order of a sum over a dimension is the device's own affair.
    total = kept[0].clone()
    for row in kept[1:]:
        total += row
    return total / len(kept)
