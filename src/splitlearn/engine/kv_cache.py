"""Keys and values of every session, in fixed slots under a byte budget; one row of a session is one slot."""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count as numbers
from itertools import repeat

import torch
from torch import Tensor

from splitlearn.errors import FrameError, KvBudgetExceeded, SettingError, first_line
from splitlearn.wire.host_memory import to_host

# N keys or values of layers   S slots   B rows   H key/value heads   L tokens of a slot   T of some
# E head size


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

    Keys and values of one shape lie in one piece of memory over all layers, so that slots are copied and
    zeroed in one operation, whatever the number of layers: a GPU would be told of each by itself.

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
        self.shapes, self.dtype = tuple(shapes), dtype
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
            self._allocate(device)
        except (RuntimeError, OSError) as error:
            raise SettingError(
                f"{self.total_bytes:,} bytes of KV cache cannot be had on {device} "
                f"({first_line(error)}): lower --kv-budget"
            ) from None
        self.visible_SL = torch.ones(self._rows, slot_tokens, dtype=torch.bool, device=device)
        self._free = list(range(self.slots))

    def _allocate(self, device: torch.device) -> None:
        tokens = self.slot_tokens if self.spare_column is None else self.slot_tokens + 1
        forms = [(shape.heads, size) for shape in self.shapes for size in (shape.key_size, shape.value_size)]
        held_NSHLE = {
            (heads, size): _zeros((alike, self._rows, heads, tokens, size), self.dtype, device)
            for (heads, size), alike in Counter(forms).items()
        }
        self._held_NSHLE = list(held_NSHLE.values())
        # Taken one by one: views that are made all at once may not be written to where torch traces.
        pieces = {
            form: map(each_NSHLE.select, repeat(0), numbers()) for form, each_NSHLE in held_NSHLE.items()
        }
        every_SHLE = [next(pieces[form]) for form in forms]
        self.keys_SHLE, self.values_SHLE = every_SHLE[::2], every_SHLE[1::2]

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
        self.wipe(slots, 0, length)
        self._free = sorted((*self._free, *slots))

    def copy(self, pairs: Iterable[tuple[int, int]], length: int) -> None:
        """Make the first `length` tokens of each pair's second slot those of its first."""
        for (source, target), count in _runs(sorted(pairs)):
            there, here = slice(source, source + count), slice(target, target + count)
            for held_NSHLE in self._held_NSHLE:
                held_NSHLE[:, here, :, :length].copy_(held_NSHLE[:, there, :, :length])
            self.visible_SL[here, :length].copy_(self.visible_SL[there, :length])

    def wipe(self, slots: Sequence[int], start: int, stop: int) -> None:
        """Forget the tokens [start, stop) of these slots: a longer row of the batch reads over them."""
        if start >= stop:
            return
        for (first,), count in _runs(sorted((slot,) for slot in slots)):
            for held_NSHLE in self._held_NSHLE:
                held_NSHLE[:, first : first + count, :, start:stop].zero_()
            self.visible_SL[first : first + count, start:stop].fill_(True)

    def hide(self, slots: Sequence[int], start: int, columns_BT: Tensor) -> None:
        """Note which of the tokens from `start` on may be looked at (True) and which are padding."""
        stop = start + columns_BT.shape[1]
        self.visible_SL[list(slots), start:stop] = columns_BT.to(self.visible_SL.device)

    @property
    def position_bytes(self) -> list[int]:
        """What keys and values of one token take, by layer."""
        return [shape.elements * self.dtype.itemsize for shape in self.shapes]

    def read(self, layer: int, slots: Sequence[int], positions: slice) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, E) of these slots, on the CPU."""
        held = (self.keys_SHLE[layer], self.values_SHLE[layer])
        keys_BHTE, values_BHTE = (to_host(each_SHLE[:, :, positions][list(slots)]) for each_SHLE in held)
        return keys_BHTE, values_BHTE

    def write(
        self, layer: int, slots: Sequence[int], start: int, keys_BHTE: Tensor, values_BHTE: Tensor
    ) -> None:
        """Put keys and values where these slots' tokens from `start` on lie.

        Raises:
            FrameError: they are not of this cache's form.
        """
        shape = self.shapes[layer]
        tokens = keys_BHTE.shape[2]
        expected = [(len(slots), shape.heads, tokens, size) for size in (shape.key_size, shape.value_size)]
        found = [tuple(each.shape) for each in (keys_BHTE, values_BHTE)]
        if found != expected or {keys_BHTE.dtype, values_BHTE.dtype} != {self.dtype}:
            raise FrameError(
                f"keys and values of shapes {found} in {keys_BHTE.dtype} came for the trunk's layer {layer}, "
                f"which holds {expected} in {self.dtype}"
            )
        stop = start + tokens
        self.keys_SHLE[layer][list(slots), :, start:stop] = keys_BHTE.to(self.visible_SL.device)
        self.values_SHLE[layer][list(slots), :, start:stop] = values_BHTE.to(self.visible_SL.device)

    def _neighbours(self, rows: int) -> tuple[int, ...] | None:
        for start in range(len(self._free) - rows + 1):
            run = tuple(self._free[start : start + rows])
            if run[-1] - run[0] == rows - 1:
                return run
        return None


def _runs(tuples: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Where each run begins whose members count up by one, in every place; and how long it is."""
    start = 0
    for end in range(1, len(tuples) + 1):
        count = end - start
        if end == len(tuples) or tuples[end] != tuple(each + count for each in tuples[start]):
            yield tuples[start], count
            start = end


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros would write to every page: seconds at the start, and the whole budget taken at once.
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
