"""The client's own half of a cache: keys and values of bottom and top, taken out and put back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from splitlearn.client.leased_layer import LeasedLayer
from splitlearn.errors import CheckpointError, UnsupportedCall

# B rows   H key/value heads   L tokens held   E head size

KNOWN = (DynamicLayer, LeasedLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True, slots=True)
class OwnLayer:
    """What one layer holds (B, H, L, E); a sliding one holds fewer tokens than it has `seen`.

    `records_past` says that it may be cropped beyond its window.
    """

    keys_BHLE: Tensor
    values_BHLE: Tensor
    seen: int
    is_sliding: bool = False
    records_past: bool = False


def take_out(cache: Cache, trunk: range) -> dict[int, OwnLayer]:
    """By the whole model's index; raises UnsupportedCall where a layer is of a kind that is not known."""
    return {
        index: _taken_out(layer)
        for index, layer in enumerate(cache.layers)
        if index not in trunk and layer.get_seq_length()
    }


def _taken_out(layer: DynamicLayer) -> OwnLayer:
    if type(layer) not in KNOWN:
        raise UnsupportedCall(
            f"a cache with a {type(layer).__name__} cannot be exported: use the library's DynamicCache"
        )
    keys_BHLE, values_BHLE = layer.keys, layer.values
    assert keys_BHLE is not None
    assert values_BHLE is not None
    return OwnLayer(
        keys_BHLE.detach().cpu().contiguous(),
        values_BHLE.detach().cpu().contiguous(),
        int(layer.get_seq_length()),
        layer.is_sliding,
        getattr(layer, "record_past", False),
    )


def put_back(model: PreTrainedModel, trunk: range, held: dict[int, OwnLayer]) -> DynamicCache:
    """A cache of this model whose own layers hold this.

    Raises:
        CheckpointError: they are not the layers of this model's bottom and top.
    """
    cache = DynamicCache(config=model.config)
    own = {index: layer for index, layer in enumerate(cache.layers) if index not in trunk}
    kinds = {index: layer.is_sliding for index, layer in own.items()}
    if kinds != {index: layer.is_sliding for index, layer in held.items()}:
        raise CheckpointError(
            f"layers {sorted(held)} are in the file, this model's bottom and top are {sorted(own)}: "
            "load the model that the session was exported from, with the same version of transformers"
        )
    for index, layer in own.items():
        _put_back(layer, held[index], model.device)
    return cache


def _put_back(layer: DynamicLayer, held: OwnLayer, device: torch.device) -> None:
    keys_BHLE, values_BHLE = held.keys_BHLE.to(device), held.values_BHLE.to(device)
    layer.lazy_initialization(keys_BHLE, values_BHLE)
    layer.keys, layer.values = keys_BHLE, values_BHLE
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = held.seen
        if held.records_past:
            layer.activate_past_recording()
