"""The dtypes that may cross the wire, by their names."""

from __future__ import annotations

import torch

from splitlearn.errors import SettingError

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})


def dtype_named(name: str) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`.

    Raises:
        SettingError: no activation is computed or sent in this dtype.
    """
    for kind in FLOATS:
        if dtype_name(kind) == name:
            return kind
    known = ", ".join(sorted(map(dtype_name, FLOATS)))
    raise SettingError(f"{name!r} is no dtype of an activation; use one of {known}")


def dtype_name(kind: torch.dtype) -> str:
    """`torch.bfloat16` -> `"bfloat16"`."""
    return str(kind).removeprefix("torch.")
