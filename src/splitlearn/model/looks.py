"""What cannot be recorded as a CUDA graph, noticed before it is tried: a look at a tensor's value.

A recording that fails leaves the device's allocator and its random numbers in a state that nothing ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LOOKS = frozenset(
    {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "lift_fresh"}
)
"""Each waits for the device, makes a shape out of values, or brings values from the host."""
INDEXED = frozenset({"index", "index_put_"})


class CannotBeRecorded(RuntimeError):
    """A step looks at values; it says with which operation."""


class NoLooks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it an operation that has to know a value, or brings one along, raises CannotBeRecorded."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = operation.overloadpacket.__name__
        if name in LOOKS or (name in INDEXED and any(map(_is_mask, args[1]))):
            raise CannotBeRecorded(f"{name} looks at a value, or brings one from the host")
        return operation(*args, **(kwargs or {}))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)
