"""A cache layer whose keys and values lie in a decode graph's memory, while only the graph writes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

# B rows   H key/value heads   L tokens held   K columns   E head size

Held = dict[int, tuple[Tensor, Tensor]]
"""(B, H, K, E) keys and values, by layer."""


class Lease:
    """One cache's use of one graph's memory; the graph is free again when its layers have gone."""

    def __init__(self, held: Held, length: int) -> None:
        self.held = held
        self.length = length

    def keep(self, cache: Cache) -> None:
        """Make what is held what this cache holds."""
        for index, held in self.held.items():
            layer = cache.layers[index]
            for target_BHKE, source_BHLE in zip(held, (layer.keys, layer.values), strict=True):
                target_BHKE[:, :, : self.length].copy_(source_BHLE)


class LeasedLayer(DynamicLayer):
    """To the library a layer like any other: who changes it other than by the graph takes it out first."""

    def __init__(self, index: int, layer: DynamicLayer) -> None:
        self._index = index
        self._lease: Lease | None = None
        self._own: list[Tensor | None] = [None, None]
        super().__init__()
        self.dtype, self.device = layer.dtype, layer.device
        self.keys, self.values = layer.keys, layer.values
        self.is_initialized = True

    def move_into(self, lease: Lease) -> None:
        """Copy what is held into this lease's memory, and stand on that from now on."""
        for target_BHKE, held_BHLE in zip(lease.held[self._index], (self.keys, self.values), strict=True):
            assert held_BHLE is not None
            target_BHKE[:, :, : lease.length].copy_(held_BHLE)
        self._lease, self._own = lease, [None, None]

    @property
    def lease(self) -> Lease | None:
        return self._lease

    @property
    def keys(self) -> Tensor | None:
        return self._read(0)

    @keys.setter
    def keys(self, keys_BHLE: Tensor | None) -> None:
        self._write(0, keys_BHLE)

    @property
    def values(self) -> Tensor | None:
        return self._read(1)

    @values.setter
    def values(self, values_BHLE: Tensor | None) -> None:
        self._write(1, values_BHLE)

    def _read(self, which: int) -> Tensor | None:
        if self._lease is None:
            return self._own[which]
        return self._lease.held[self._index][which][:, :, : self._lease.length]

    def _write(self, which: int, tensor: Tensor | None) -> None:
        if self._lease is not None:
            # What is written may be a view of memory that another cache is given next.
            tensor = None if tensor is None else tensor.clone()
            self._own = [_cloned(self._read(0)), _cloned(self._read(1))]
            self._lease = None
        self._own[which] = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicLayer:
        copied = DynamicLayer()
        copied.dtype, copied.device = self.dtype, self.device
        copied.keys, copied.values = _cloned(self.keys), _cloned(self.values)
        copied.is_initialized = self.is_initialized
        return copied


def _cloned(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
