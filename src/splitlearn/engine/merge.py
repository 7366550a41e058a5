"""How the gradients of a round's members become one, and how that is clipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from splitlearn.engine.contribution import Gradients

CLIP_EPSILON = 1e-6


def coefficients(weights: Sequence[float], staleness: Sequence[int], exponent: float) -> list[float]:
    """What each member's mean gradient counts: its part of all weights, times (1 + s) ** -exponent.

    The parts add up to 1, and what staleness takes from one goes to nobody (FedBuff, Nguyen et al. 2022):
    a round of old gradients alone is a smaller step.
    """
    total = sum(weights)
    return [weight / total * (1 + s) ** -exponent for weight, s in zip(weights, staleness, strict=True)]


def weighted_sum(each: Sequence[Gradients], factors: Sequence[float]) -> Gradients:
    """Added up in the order that they are given in, so that the same order gives the same bits."""
    merged: Gradients = [None] * len(each[0])
    for gradients, factor in zip(each, factors, strict=True):
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                term, held = gradient * factor, merged[place]
                merged[place] = term if held is None else held + term
    return merged


def clip(gradients: Gradients, max_norm: float) -> tuple[Gradients, float, float]:
    """The gradients so that their common 2-norm is at most `max_norm` (0: as they are), as torch clips.

    Returns:
        The gradients, their norm before, and what they were multiplied by.
    """
    before = norm(gradients)
    if not max_norm or not before:
        return gradients, before, 1.0
    scale = clip_scale(before, max_norm)
    return [None if gradient is None else gradient * scale for gradient in gradients], before, scale


def norm(gradients: Gradients) -> float:
    """The common 2-norm of all that are there."""
    there = [gradient for gradient in gradients if gradient is not None]
    return float(torch.nn.utils.get_total_norm(there)) if there else 0.0


def clip_scale(norm: float, max_norm: float) -> float:
    """What clipping multiplies gradients of this norm by: in float32, as torch computes it."""
    return float(torch.clamp(max_norm / (torch.tensor(norm) + CLIP_EPSILON), max=1.0))


def learning_rate(rates: Sequence[float], weights: Sequence[float]) -> float:
    """The members' own where they agree, else their weighted mean."""
    if len(set(rates)) == 1:
        return rates[0]
    return sum(rate * weight for rate, weight in zip(rates, weights, strict=True)) / sum(weights)


def is_finite(gradients: Sequence[Tensor | None]) -> bool:
    """Whether all of them are numbers: one that is not would be everybody's."""
    there = [gradient for gradient in gradients if gradient is not None]
    return all(bool(norm.isfinite()) for norm in torch._foreach_norm(there, 2.0)) if there else True
