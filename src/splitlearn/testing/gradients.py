"""Gradients of every LoRA weight, split against whole: the same adapter on both, the same batch."""

from __future__ import annotations

from dataclasses import replace

import torch
import xxhash
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from splitlearn.client.parts import trunk_of
from splitlearn.client.training import prepare_training
from splitlearn.engine.engine import Engine
from splitlearn.engine.run import Run
from splitlearn.model.lora import ADAPTER, add_lora, settings_of, weights_of

WAIT_S = 60.0
SPREAD = 0.05


def adapted(whole: PreTrainedModel, split: PreTrainedModel, engine: Engine, lora: LoraConfig) -> None:
    """Give both models one adapter whose weights are all random: with B at zero A would get no gradient."""
    add_lora(whole, settings_of(lora, whole.config.model_type), ADAPTER, seed=0)
    prepare_training(split, lora, run=None, freeze=(), seed=0)
    for model in (whole, split):
        with torch.no_grad():
            for name, weight in weights_of(model, ADAPTER).items():
                weight.copy_(_some_of(name, weight))

    def spread(run: Run) -> None:
        taken = run.snapshot()
        weights = {name: _some_of(name, weight) for name, weight in taken.weights.items()}
        run.restore(replace(taken, weights=weights))

    engine.runs.do(trunk_of(split).run.name, spread).result(WAIT_S)


def gradients_of_whole(whole: PreTrainedModel) -> dict[str, Tensor]:
    return _there({name: weight.grad for name, weight in weights_of(whole, ADAPTER).items()})


def gradients_of_split(split: PreTrainedModel, engine: Engine) -> dict[str, Tensor]:
    """Those of bottom and top, and those that the trunk has accumulated."""
    run_name = trunk_of(split).run.name
    ours = {name: weight.grad for name, weight in weights_of(split, ADAPTER).items()}
    theirs = engine.runs.do(run_name, Run.gradients).result(WAIT_S)
    return _there(ours | theirs)


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest distance of a weight's gradient, over the largest of that gradient; inf if one lacks."""
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(_distance(ours[name], theirs[name]) for name in theirs)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    largest = theirs.abs().max().clamp(min=torch.finfo(theirs.dtype).tiny)
    return float((ours - theirs).abs().max() / largest)


def _there(gradients: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: gradient.detach().cpu() for name, gradient in gradients.items() if gradient is not None}


def _some_of(name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(name.encode()) >> 1)
    return torch.randn(like.shape, generator=generator) * SPREAD
