"""A layer of the library's `Cache` whose shapes never change: a step's places are read from the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

# S slots   R rows   H key/value heads   L tokens of a slot   K columns   E head size

FEWEST_COLUMNS = 256


def bucket(count: int, fewest: int = 1) -> int:
    """The smallest power of two that is no less than either."""
    return max(fewest, 1 << (count - 1).bit_length())


class StaticLayer(CacheLayerMixin):
    """One layer's keys and values at a decode step: one new token a row.

    Args:
        keys_SHLE: where keys lie; values_SHLE: and values.
        slot_R: (R,) which slot each row is.
        column_R: (R,) where each row's new token goes.
        columns: how many columns rows look at; a mask says which of them count.
        standing: whether row i is slot i, so that nothing is gathered.
    """

    is_compileable = True
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(
        self,
        keys_SHLE: Tensor,
        values_SHLE: Tensor,
        slot_R: Tensor,
        column_R: Tensor,
        columns: int,
        *,
        standing: bool = False,
    ) -> None:
        super().__init__()
        self.is_initialized = True
        self._keys_SHLE, self._values_SHLE = keys_SHLE, values_SHLE
        self._slot_R, self._column_R = slot_R, column_R
        self._columns, self._standing = columns, standing

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token a row (R, H, 1, E); give back (R, H, K, E) twice."""
        return self._put(self._keys_SHLE, key_states), self._put(self._values_SHLE, value_states)

    def _put(self, layer_SHLE: Tensor, new_RH1E: Tensor) -> Tensor:
        layer_SHLE[self._slot_R, :, self._column_R] = new_RH1E[:, :, 0]
        seen_SHKE = layer_SHLE[:, :, : self._columns]
        if self._standing:
            return seen_SHKE[: len(new_RH1E)]
        return seen_SHKE.index_select(0, self._slot_R)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._columns, 0

    def get_seq_length(self, *args: Any) -> int:
        """What no row may rely on: each has its own."""
        return self._columns - 1

    def get_max_length(self) -> int:
        return self._columns

    get_max_cache_shape = get_max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("its memory is there before the first step")
