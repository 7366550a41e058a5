"""The trunk's optimizer, over a run's float32 weights: torch's by the library's names, or a server's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from splitlearn.engine.adaptive import Adaptive, FedAdam, FedYogi
from splitlearn.errors import SettingError
from splitlearn.vocabulary import OptimizerSettings


def build(settings: OptimizerSettings, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
    """What `TrainingArguments(optim=settings.name)` builds on a whole model; or a server's own optimizer."""
    require_known(settings)
    return BUILDERS[settings.name](settings, weights)


def require_known(settings: OptimizerSettings) -> None:
    """Raises SettingError where it is none of those that are served, or torch takes no such constants."""
    if settings.name not in BUILDERS:
        raise SettingError(
            f"the trunk has no optimizer {settings.name!r}: use optim= one of {', '.join(sorted(BUILDERS))}"
        )
    try:
        BUILDERS[settings.name](settings, [torch.zeros(1, requires_grad=True)])
    except ValueError as error:
        raise SettingError(f"{settings.name} refuses {settings}: {error}") from None


def state_bytes(settings: OptimizerSettings, weight_bytes: int) -> int:
    """What the optimizer will keep of so many bytes of weights, from its first step on."""
    if settings.name == "sgd":
        return weight_bytes if settings.momentum else 0
    return 2 * weight_bytes


def _adamw(settings: OptimizerSettings, weights: Sequence[Tensor], **how: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        weights,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        **how,
    )


def _sgd(settings: OptimizerSettings, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        weights,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def _adaptive(
    kind: type[Adaptive], settings: OptimizerSettings, weights: Sequence[Tensor]
) -> torch.optim.Optimizer:
    return kind(
        weights,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        epsilon=settings.epsilon,
        weight_decay=settings.weight_decay,
    )


BUILDERS: Mapping[str, Callable[[OptimizerSettings, Sequence[Tensor]], torch.optim.Optimizer]] = {
    "adamw_torch": _adamw,
    "adamw_torch_fused": partial(_adamw, fused=True),
    "sgd": _sgd,
    "fedadam": partial(_adaptive, FedAdam),
    "fedyogi": partial(_adaptive, FedYogi),
}
