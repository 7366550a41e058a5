"""Making a client's model ready to be trained: LoRA on bottom and top, and a run planned on the trunk."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitlearn.client.adapter_files import read_config, start_from
from splitlearn.client.remote_trunk import NO_RUN, RemoteTrunk
from splitlearn.client.run import require_same
from splitlearn.errors import SettingError, UnsupportedCall
from splitlearn.model.lora import ADAPTER, add_lora, settings_of
from splitlearn.vocabulary import LoraSettings, OptimizerSettings, Precision, RunSettings, TapeSettings
from splitlearn.wire.messages import OpenRun

PARTS = ("bottom", "trunk", "top")
NOT_TRAINED = LoraSettings(r=0)
CLIP_EPSILON = 1e-6


def prepare_training(
    model: PreTrainedModel,
    lora: LoraConfig | str | Path | None,
    run: str | None,
    freeze: Collection[str],
    seed: int,
    tape: TapeSettings | None = None,
    *,
    allow_download: bool = True,
) -> None:
    """Put LoRA on bottom and top, and plan the trunk's run; without `lora` and `freeze` nothing is done.

    `lora` is PEFT's configuration, or the folder of an adapter to go on from. The other arguments are
    those of `AutoSplitModelForCausalLM.from_pretrained`.

    Raises:
        SettingError: `freeze` names no part, or leaves nothing to train.
        AdapterError: the LoRA settings cannot be used.
    """
    if unknown := set(freeze) - set(PARTS):
        raise SettingError(f"freeze names {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    if set(freeze) == set(PARTS):
        raise SettingError("freeze names every part: leave out one to train")
    if lora is None and "trunk" not in freeze:
        if freeze or run is not None:
            raise SettingError(
                "give lora=LoraConfig(...) to train the trunk, or freeze=['trunk'] to leave it be"
            )
        return
    adapter = NOT_TRAINED
    folder = None if lora is None or isinstance(lora, LoraConfig) else Path(lora)
    if folder is not None:
        lora = read_config(folder)
    if isinstance(lora, LoraConfig):
        adapter = settings_of(lora, model.config.model_type)
        add_lora(model, adapter, ADAPTER, seed)
        model._hf_peft_config_loaded = True  # what transformers' own add_adapter notes
    trunk = trunk_of(model)
    for part, parameter in parts_of(model, trunk):
        if part in freeze:
            parameter.requires_grad_(False)
    trunk.lora = adapter
    asked = NOT_TRAINED if "trunk" in freeze else adapter
    name = run or f"run-{secrets.token_hex(8)}"
    settings = RunSettings(lora=asked, tape=tape or TapeSettings(), seed=seed, allow_download=allow_download)
    trunk.planned, trunk.is_named = OpenRun(name, settings), run is not None
    if folder is not None:
        start_from(model, trunk, folder)


def trunk_of(model: nn.Module) -> RemoteTrunk:
    """The remote layer of a split model, whatever wraps the model.

    Raises:
        SettingError: this is no split model.
    """
    for module in model.modules():
        if isinstance(module, RemoteTrunk):
            return module
    raise SettingError("this is no split model: load it with AutoSplitModelForCausalLM.from_pretrained")


def parts_of(model: nn.Module, trunk: RemoteTrunk) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter of the client once, in the whole model's order, as ("bottom" | "top", parameter)."""
    part, seen = "bottom", set()
    for module in model.modules():
        if module is trunk:
            part = "top"
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield part, parameter


def clip_grad_norm(model: nn.Module, max_norm: float, trunk_norms: Tensor | None = None) -> Tensor:
    """Clip the gradients of bottom, trunk and top by their common norm, as torch does on a whole model.

    The trunk's norms come over the wire one a weight and take their places among the client's, so
    that the sum is taken in the whole model's order: the result is torch's, bit for bit. The trunk
    scales its gradients with its next optimizer step.

    Args:
        model: a split model, wrapped or not.
        max_norm: the 2-norm that the gradients may have together.
        trunk_norms: what `model.trunk.grad_norms()` gave, where it has been asked already.

    Returns:
        Their norm before (a scalar); not finite where one of them is not.
    """
    trunk = trunk_of(model)
    below, above = (
        [each.grad for part, each in parts_of(model, trunk) if part == side and each.grad is not None]
        for side in ("bottom", "top")
    )
    device = next((gradient.device for gradient in (*below, *above)), torch.device("cpu"))
    between = trunk.grad_norms() if trunk_norms is None else trunk_norms
    # What an earlier clipping left of them; the trunk scales its gradients when it steps.
    between = (between[between != -1] * trunk.gradient_scale).to(device)
    norms = [*_norms(below), *between.unbind(), *_norms(above)]
    if not norms:
        return torch.zeros(())
    total = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))
    scale = torch.clamp(max_norm / (total + CLIP_EPSILON), max=1.0)
    for gradient in (*below, *above):
        gradient.mul_(scale.to(gradient.device))
    trunk.gradient_scale *= float(scale)
    return total


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_norm(gradients, 2.0)) if gradients else []


def plan_run(
    trunk: RemoteTrunk, optimizer: OptimizerSettings, accumulation: int = 1, autocast: str = ""
) -> None:
    """Say what the run is opened with; of an open one, only the accumulation can still change.

    Raises:
        UnsupportedCall: the model was loaded without `lora=`.
        SettingError: the run is open already, with another optimizer or precision.
    """
    if trunk.planned is None:
        raise UnsupportedCall(NO_RUN)
    settings = replace(
        trunk.planned.settings,
        optimizer=optimizer,
        accumulation=accumulation,
        precision=Precision(autocast=autocast),
    )
    if trunk.is_training and not trunk.reopen_if_unused():
        require_same(trunk.run.name, trunk.run.settings, settings)
        trunk.run.accumulation = accumulation
    trunk.planned = replace(trunk.planned, settings=settings)
