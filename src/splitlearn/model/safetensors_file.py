"""What one safetensors file holds, and where, read from its header without opening a tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn.errors import CheckpointError

_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file: its dtype as the file spells it, its shape, its bytes' place."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Each tensor's entry by name; a file that is cut short or is no safetensors file is refused."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(told, 8 + length) for name, told in header.items()}
        ends = max((entry.stop for entry in entries.values()), default=0)
        if path.stat().st_size < ends:
            raise ValueError(f"{path.stat().st_size} bytes of {ends}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); download or save it again"
        ) from None
    return entries


def _entry(told: dict[str, Any], data_start: int) -> TensorEntry:
    start, stop = told["data_offsets"]
    return TensorEntry(told["dtype"], tuple(told["shape"]), data_start + start, data_start + stop)
