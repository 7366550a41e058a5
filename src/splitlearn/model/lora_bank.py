"""Several adapters in one batch: each row computes with its own, read from stacked weights by an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# S places   R rows   T tokens   I features in   O features out   K rank

BARE_PLACE = 0
"""Its weights are zero: the base model without an adapter."""
DTYPE = torch.float32
"""What PEFT computes adapters in, whatever the model's weights are."""


@dataclass(frozen=True, slots=True)
class PlainLora:
    """An adapter in one layer, where it is `x + scale * B A x` and nothing else."""

    layer: LoraLayer
    rank: int
    scale: float

    @property
    def rank_bytes(self) -> int:
        """What one more rank takes."""
        features = int(self.layer.in_features) + int(self.layer.out_features)
        return features * DTYPE.itemsize


def plain_loras(model: nn.Module, adapter: str) -> dict[str, PlainLora] | None:
    """By its module's name, each layer of an adapter; None where one of them is more than plain LoRA.

    That is DoRA, and LoRA of experts: what they are given is not the batch's rows.
    """
    found: dict[str, PlainLora] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer._all_available_adapter_names():
            continue
        if not _is_plain(layer, adapter) or ".experts." in name:
            return None
        found[name] = PlainLora(layer, layer.r[adapter], layer.scaling[adapter])
    return found


def _is_plain(layer: LoraLayer, adapter: str) -> bool:
    return (
        type(layer) is Linear
        and isinstance(layer.get_base_layer(), nn.Linear | Conv1D)
        and adapter not in layer.lora_variant
        and not layer.lora_bias[adapter]
    )


class LoraBank:
    """Weights of a fixed number of adapters, padded with zeros to each layer's largest rank.

    Which adapter a row has is read on the device, so that one CUDA graph serves them all. Rows read the
    weights of their own adapter only: what another's hold, be it not a number, cannot reach them.

    Args:
        layers: by its module's name, each layer that any adapter has, its rank being the largest.
        places: how many adapters there may be, the bare one among them.
    """

    def __init__(self, layers: Mapping[str, PlainLora], places: int) -> None:
        self._layers = {name: BankedLayer(each, places) for name, each in layers.items()}

    @property
    def bytes(self) -> int:
        return sum(layer.down_SIK.nbytes + layer.up_SKO.nbytes for layer in self._layers.values())

    def put(self, place: int, adapter: Mapping[str, PlainLora], weights: Mapping[str, Tensor]) -> None:
        """Let rows of this place compute with an adapter's weights, named as in PEFT's files."""
        for name, layer in self._layers.items():
            layer.clear(place)
            if name in adapter:
                down_KI, up_OK = (weights[f"{name}.lora_{side}.weight"] for side in "AB")
                layer.put(place, down_KI, up_OK * adapter[name].scale)

    @contextmanager
    def bound(self, place_R: Tensor) -> Iterator[None]:
        """Within it the model's rows compute with the adapters of these places."""
        for layer in self._layers.values():
            layer.bind(place_R)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.unbind()


class BankedLayer:
    """One of PEFT's layers, and what stands in its forward's place while the bank is bound."""

    def __init__(self, plain: PlainLora, places: int) -> None:
        layer, rank = plain.layer, plain.rank
        device = layer.get_base_layer().weight.device
        self._layer = layer
        self.down_SIK = torch.zeros(places, layer.in_features, rank, dtype=DTYPE, device=device)
        self.up_SKO = torch.zeros(places, rank, layer.out_features, dtype=DTYPE, device=device)

    def clear(self, place: int) -> None:
        self.down_SIK[place].zero_()
        self.up_SKO[place].zero_()

    def put(self, place: int, down_KI: Tensor, up_OK: Tensor) -> None:
        rank = len(down_KI)
        self.down_SIK[place, :, :rank].copy_(down_KI.T)
        self.up_SKO[place, :rank].copy_(up_OK.T)

    def bind(self, place_R: Tensor) -> None:
        vars(self._layer)["forward"] = self._forward(place_R)

    def unbind(self) -> None:
        del vars(self._layer)["forward"]

    def _forward(self, place_R: Tensor) -> Callable[..., Tensor]:
        base, rows = self._layer.get_base_layer(), len(place_R)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = base(x, *args, **kwargs)
            # Some families lay rows and tokens in one dimension, row after row.
            x_RTI = x.reshape(rows, -1, x.shape[-1]).to(DTYPE)
            low_RTK = torch.bmm(x_RTI, self.down_SIK.index_select(0, place_R))
            added_RTO = torch.bmm(low_RTK, self.up_SKO.index_select(0, place_R))
            # Added in float32 and rounded once, as PEFT does it.
            return out.add_(added_RTO.view(out.shape))

        return forward
