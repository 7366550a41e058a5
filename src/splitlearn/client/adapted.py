"""The modules of bottom and top that have an adapter which can be averaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitlearn.client.parts import units_of
from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.errors import AdapterError, SettingError
from splitlearn.model.lora import ADAPTER

# O out   I in


@dataclass(frozen=True, slots=True)
class Adapted:
    """One module of bottom or top with its adapter."""

    layer: LoraLinear

    @property
    def a(self) -> nn.Parameter:
        weight: nn.Parameter = self.layer.lora_A[ADAPTER].weight
        return weight

    @property
    def b(self) -> nn.Parameter:
        weight: nn.Parameter = self.layer.lora_B[ADAPTER].weight
        return weight

    @torch.no_grad()
    def add_to_base(self, change_OI: Tensor) -> None:
        """Beside the adapter, so by its scale; gpt2's layers keep their weight the other way round."""
        base = self.layer.get_base_layer().weight
        change = change_OI.to(base.device) * self.layer.scaling[ADAPTER]
        base.copy_(base.float() + (change.T if self.layer.fan_in_fan_out else change))


def adapted_ends(model: PreTrainedModel, trunk: RemoteTrunk) -> Iterator[tuple[str, Adapted]]:
    """By name, the modules of bottom and top whose adapter is trained.

    Raises:
        SettingError: some of it is trained in full; AdapterError: an adapter is of another kind.
    """
    head = model.get_output_embeddings()
    for _, name, unit in units_of(model, trunk):
        for path, module in unit.named_modules(prefix=name):
            if isinstance(module, LoraLayer) and any(each.requires_grad for each in module.parameters()):
                _require_averageable(path, module, head)
                assert isinstance(module, LoraLinear)
                yield path, Adapted(module)
        own = [path for path, each in unit.named_parameters() if each.requires_grad and "lora_" not in path]
        if own:
            raise SettingError(
                f"share= averages adapters, and {name} is trained in full ({own[0]}): leave out full=, or "
                "take share='personal'"
            )


def _require_averageable(path: str, layer: LoraLayer, head: nn.Module | None) -> None:
    """Raises AdapterError where its change is not B A, or a row of it would stand for a word."""
    base = layer.get_base_layer()
    if head is layer or head is base or isinstance(base, nn.Embedding):
        raise AdapterError(
            f"{path} has a row for each word, so its adapter would tell others which words are used: take it "
            "out of target_modules"
        )
    if not isinstance(layer, LoraLinear) or not isinstance(base, nn.Linear | Conv1D):
        raise AdapterError(f"{path} is a {type(base).__name__}: only adapters of linear layers are averaged")
    if layer.use_dora.get(ADAPTER, False):
        raise AdapterError(
            f"{path} has a DoRA adapter, which is not a product of two matrices: leave use_dora out"
        )
