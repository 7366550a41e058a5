"""Keys and values of every session, in fixed slots under a byte budget; one row of a session is one slot."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitlearn.errors import KvBudgetExceeded, SettingError

# S slots   H key/value heads   L tokens of a slot   E head size


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: `heads` keys of `key_size` and values of `value_size`."""

    heads: int
    key_size: int
    value_size: int

    @property
    def elements(self) -> int:
        return self.heads * (self.key_size + self.value_size)


class KvCache:
    """Allocated once: no session's cache is copied as it grows, and a freed slot is zeroed for the next.

    On the CPU the memory of untouched slots is not taken from the system; the budget counts it all the same.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        budget_bytes: int,
        slot_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        spare: bool = False,
    ) -> None:
        self.token_bytes = sum(shape.elements for shape in shapes) * dtype.itemsize
        self.slot_tokens = slot_tokens
        self.slots = budget_bytes // (self.token_bytes * slot_tokens)
        if not self.slots:
            raise SettingError(
                f"the KV budget of {budget_bytes:,} bytes holds no session of {slot_tokens:,} tokens "
                f"({self.token_bytes * slot_tokens:,} bytes): raise --kv-budget or lower --session-tokens"
            )
        self.spare = self.slots if spare else None
        """A slot beyond the budget that is nobody's, for rows that only fill a batch up."""
        self.spare_column = slot_tokens if spare else None
        """A column that no row looks at, in every slot, for slots whose turn it is not."""
        try:
            self._allocate(shapes, dtype, device)
        except (RuntimeError, OSError) as error:
            raise SettingError(
                f"{self.total_bytes:,} bytes of KV cache cannot be had on {device} "
                f"({str(error).splitlines()[0]}): lower --kv-budget"
            ) from None
        self.visible_SL = torch.ones(self._rows, slot_tokens, dtype=torch.bool, device=device)
        self._free = list(range(self.slots))

    def _allocate(self, shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device) -> None:
        tokens = self.slot_tokens if self.spare_column is None else self.slot_tokens + 1
        self.keys_SHLE = [
            _zeros((self._rows, shape.heads, tokens, shape.key_size), dtype, device) for shape in shapes
        ]
        self.values_SHLE = [
            _zeros((self._rows, shape.heads, tokens, shape.value_size), dtype, device) for shape in shapes
        ]

    @property
    def _rows(self) -> int:
        return self.slots + (self.spare is not None)

    @property
    def slot_bytes(self) -> int:
        return self.token_bytes * self.slot_tokens

    @property
    def total_bytes(self) -> int:
        return self.slot_bytes * self.slots

    @property
    def free_bytes(self) -> int:
        return self.slot_bytes * len(self._free)

    def take(self, rows: int) -> tuple[int, ...]:
        """Slots for this many rows, neighbours where there are any (a batch of neighbours is a view).

        Raises:
            KvBudgetExceeded: with the bytes that are wanted, free and there in all.
        """
        if rows > len(self._free):
            raise KvBudgetExceeded(
                f"{rows} rows take {rows * self.slot_bytes:,} bytes of KV cache, {self.free_bytes:,} of "
                f"{self.total_bytes:,} are free: use fewer rows or beams, wait for other sessions to end, "
                "or start the server with a larger --kv-budget or a smaller --session-tokens",
                facts={
                    "wanted_bytes": rows * self.slot_bytes,
                    "free_bytes": self.free_bytes,
                    "total_bytes": self.total_bytes,
                },
            )
        taken = self._neighbours(rows) or tuple(self._free[:rows])
        self._free = [slot for slot in self._free if slot not in taken]
        return taken

    def give_back(self, slots: Sequence[int], length: int) -> None:
        """Free the slots; their first `length` tokens are wiped, so that nobody meets another's."""
        for slot in slots:
            for layer_SHLE in (*self.keys_SHLE, *self.values_SHLE):
                layer_SHLE[slot, :, :length].zero_()
            self.visible_SL[slot].fill_(True)
        self._free = sorted((*self._free, *slots))

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of slot `target` those of slot `source`."""
        for layer_SHLE in (*self.keys_SHLE, *self.values_SHLE):
            layer_SHLE[target, :, :length].copy_(layer_SHLE[source, :, :length])
        self.visible_SL[target].copy_(self.visible_SL[source])

    def wipe(self, slots: Sequence[int], start: int, stop: int) -> None:
        """Forget the tokens [start, stop) of these slots: a longer row of the batch reads over them."""
        for slot in slots:
            for layer_SHLE in (*self.keys_SHLE, *self.values_SHLE):
                layer_SHLE[slot, :, start:stop].zero_()
            self.visible_SL[slot, start:stop].fill_(True)

    def hide(self, slots: Sequence[int], start: int, columns_BT: Tensor) -> None:
        """Note which of the tokens from `start` on may be looked at (True) and which are padding."""
        stop = start + columns_BT.shape[1]
        for slot, columns_T in zip(slots, columns_BT, strict=True):
            self.visible_SL[slot, start:stop] = columns_T

    def _neighbours(self, rows: int) -> tuple[int, ...] | None:
        for start in range(len(self._free) - rows + 1):
            run = tuple(self._free[start : start + rows])
            if run[-1] - run[0] == rows - 1:
                return run
        return None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros would write to every page: seconds at the start, and the whole budget taken at once.
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
