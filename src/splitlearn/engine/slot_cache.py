"""The library's `Cache`, standing on the slots of the batch that runs now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from splitlearn.engine.batch_plan import BatchPlan
from splitlearn.engine.kv_cache import KvCache

# B rows   T new tokens   K columns looked at   H heads   E head size


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values of the running batch.

    Rows of equal length look at exactly the columns that the library's own cache would hand out,
    a sliding window cut where the library cuts it; ragged rows look at all columns up to the
    longest row's end, and the mask says which are theirs.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, kv: KvCache, index: int, window: int | None) -> None:
        super().__init__()
        self.is_sliding = window is not None
        self.is_initialized = True
        self._keys_SHLE = kv.keys_SHLE[index]
        self._values_SHLE = kv.values_SHLE[index]
        self._window = window
        self._batch: _Batch | None = None

    def begin(self, batch: _Batch) -> None:
        self._batch = batch

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens (B, H, T, E) at each row's own place; give back what the rows look at."""
        batch = self._running
        batch.write(self._keys_SHLE, key_states)
        batch.write(self._values_SHLE, value_states)
        start = batch.first_column(self._window)
        return batch.read(self._keys_SHLE, start), batch.read(self._values_SHLE, start)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        start = self._running.first_column(self._window)
        return self._running.plan.length - start, start

    def get_seq_length(self, *args: Any) -> int:
        return max(self._running.plan.lengths)

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("slots are allocated before the first step")

    @property
    def _running(self) -> _Batch:
        assert self._batch is not None
        return self._batch


class SlotCache(Cache):
    """Handed to the family's own forward in place of a cache object per session."""

    def __init__(self, kv: KvCache, windows: list[int | None]) -> None:
        super().__init__(layers=[SlotLayer(kv, index, window) for index, window in enumerate(windows)])

    def begin(self, plan: BatchPlan) -> Tensor:
        """Stand on this plan's rows until the next one; gives their new tokens' columns (B, T)."""
        batch = _Batch(plan)
        for layer in self.layers:
            layer.begin(batch)
        return batch.columns_BT


class _Batch:
    """Where the rows of one plan lie, worked out once for all layers."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        first = plan.slots[0]
        self._rows = slice(first, first + len(plan.slots)) if plan.contiguous else None
        self._slots_B = torch.tensor(plan.slots)
        self.columns_BT = torch.tensor(plan.lengths)[:, None] + torch.arange(plan.tokens)

    def write(self, layer_SHLE: Tensor, new_BHTE: Tensor) -> None:
        plan = self.plan
        if self._rows is not None and not plan.ragged:
            layer_SHLE[self._rows, :, plan.lengths[0] : plan.length].copy_(new_BHTE)
        else:
            self._to(layer_SHLE.device)
            layer_SHLE[self._slots_B[:, None], :, self.columns_BT] = new_BHTE.transpose(1, 2)

    def read(self, layer_SHLE: Tensor, start: int) -> Tensor:
        columns_SHKE = layer_SHLE[:, :, start : self.plan.length]
        if self._rows is not None:
            return columns_SHKE[self._rows]
        self._to(layer_SHLE.device)
        return columns_SHKE.index_select(0, self._slots_B)

    def first_column(self, window: int | None) -> int:
        if window is None or self.plan.ragged:
            return 0
        return max(self.plan.lengths[0] - window + 1, 0)

    def _to(self, device: torch.device) -> None:
        if self._slots_B.device != device:
            self._slots_B = self._slots_B.to(device)
            self.columns_BT = self.columns_BT.to(device)
