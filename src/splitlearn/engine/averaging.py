"""The arithmetic of averaging adapters: what the mean is, what it loses, and what makes up for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from splitlearn.model.thin import SMALLEST, Thin, accumulated, combined, norm, root_of_squares, thinned

# N members   B, A: LoRA's factors of one module; its matrix is B A

A, B = ".lora_A.weight", ".lora_B.weight"
EXACT = "fedex"


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """Adapters' mean by their weights' names; `residual` is what each module's base gets in addition.

    `aggregation_residual` is what is still missing of the mean of the products, as a part of its norm:
    |sum w B A - (mean B)(mean A) - residual| / |sum w B A| over all modules (0 where that is 0 / 0).
    """

    weights: Mapping[str, Tensor]
    residual: Mapping[str, Thin] = field(default_factory=dict)
    aggregation_residual: float = 0.0


def mean_of(rule: str, each: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Mean:
    """The members' adapters as one.

    "fedavg" is the mean of A and of B (McMahan et al. 2017), and "ffa" that of B where all have the same A
    (Sun et al. 2024). "fedex" adds the residual (Singhal et al. 2024), which is that of
    the products of the deviations from the means, so of rank (N - 1) r at most.

    Args:
        rule: as in `ShareSettings`.
        each: a member's weights by name, all with the same names and shapes, in float32.
        weights: how much each counts, none below 0; all alike where all are 0.
    """
    factors = _parts_of_one(weights)
    means = {name: _mean([weights[name] for weights in each], factors) for name in each[0]}
    residual, missing, sizes = {}, [], []
    for module in modules_of(means):
        products = [_product(weights, module) for weights in each]
        size = norm(combined(products, factors))
        sizes.append(size)
        parts, signs = [*products, _product(means, module)], [*factors, -1.0]
        if rule == EXACT:
            # As it is sent, in float32: what that loses is told, too.
            sent = thinned(combined(parts, signs), floor=SMALLEST * size)
            if sent.rank:
                residual[module] = sent
                parts, signs = [*parts, sent], [*signs, -1.0]
        missing.append(norm(combined(parts, signs)))
    whole = root_of_squares(sizes)
    return Mean(means, residual, root_of_squares(missing) / whole if whole else 0.0)


def added(total: Mapping[str, Thin], residual: Mapping[str, Thin]) -> dict[str, Thin]:
    """Residuals of several averages as one, by module."""
    sums = dict(total)
    for module, each in residual.items():
        sums[module] = accumulated(sums[module], each) if module in sums else each
    return sums


def modules_of(weights: Mapping[str, Tensor]) -> list[str]:
    """Those of which both factors are there."""
    return [name.removesuffix(A) for name in weights if name.endswith(A)]


def _product(weights: Mapping[str, Tensor], module: str) -> Thin:
    return Thin(weights[module + B], weights[module + A])


def _parts_of_one(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total if total else 1 / len(weights) for weight in weights]


def _mean(each: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Added up in float64: what it loses is told beside it, and shall not be roundings."""
    return sum(
        (weight.double() * factor for weight, factor in zip(each[1:], factors[1:], strict=True)),
        start=each[0].double() * factors[0],
    ).float()
