"""What a run takes of its members' bottoms and tops, where it trains their adapters with the trunk's."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from splitlearn.engine.contribution import Gradients, scaled
from splitlearn.errors import MessageError, ResourceExhausted


def first(weights: Mapping[str, Tensor], trunk: Collection[str], max_bytes: int) -> dict[str, Tensor]:
    """What bottom and top begin with, in the order of their names, which is the same on every side.

    Raises:
        MessageError: the trunk has one of the names, or a value is no number.
        ResourceExhausted: they are larger than any adapter may be here.
    """
    if both := weights.keys() & set(trunk):
        raise MessageError(f"{min(both)} is the trunk's: send the weights of bottom and top alone")
    size = sum(weight.nbytes for weight in weights.values())
    if size > max_bytes:
        raise ResourceExhausted(
            f"the adapters of bottom and top take {size:,} bytes, this server allows {max_bytes:,} "
            "(runs.max_adapter_bytes): use a smaller rank",
            facts={"bytes": size, "max_bytes": max_bytes},
        )
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise MessageError(f"{name} has values that are no numbers: load the model again")
    return {name: weights[name] for name in sorted(weights)}


def gradients(given: Mapping[str, Tensor], ends: Mapping[str, Tensor], scale: float) -> Gradients:
    """One for each of the run's ends, in their order, scaled as the trunk's are; None where none came.

    Raises:
        MessageError: there are others among them, or of other shapes.
    """
    if unknown := given.keys() - ends.keys():
        raise MessageError(f"a gradient of {min(unknown)}, which the run's bottom and top lack: give its cut")
    for name, gradient in given.items():
        if gradient.shape != ends[name].shape:
            raise MessageError(
                f"the gradient of {name} has shape {list(gradient.shape)}, the run needs "
                f"{list(ends[name].shape)}: load the model with the run's LoRA settings"
            )
    found = [given.get(name) for name in ends]
    devices = [weight.device for weight in ends.values()]
    placed = [
        None if gradient is None else gradient.to(device, torch.float32)
        for gradient, device in zip(found, devices, strict=True)
    ]
    return scaled(placed, scale)
