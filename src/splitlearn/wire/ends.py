"""The adapters of bottom and top, or their gradients, as named frames of a step or its answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from splitlearn.errors import FrameError, MessageError
from splitlearn.vocabulary import Role
from splitlearn.wire.frames import FrameFormat, decode_frame, write_frame

NAME = re.compile(r"[A-Za-z0-9_.]{1,512}")
MAX_WEIGHTS = 1 << 16


def write(frames: Any, tensors: Mapping[str, Tensor], role: Role, format: FrameFormat) -> None:
    """Into a message's repeated frames, as they are, whatever codec the activations have."""
    for name, tensor in tensors.items():
        frame = frames.add(name=name)
        write_frame(frame, tensor, role, FrameFormat(checksum=format.checksum))


def read(frames: Any, role: Role, *, checksum: bool) -> dict[str, Tensor]:
    """By name, float32, on the CPU.

    Raises:
        MessageError: names are none, twice there or too many.
        FrameError: a tensor is malformed, or of another dtype; CorruptFrame: its bytes changed on the way.
    """
    if len(frames) > MAX_WEIGHTS:
        raise MessageError(f"{len(frames):,} weights of bottom and top, at most {MAX_WEIGHTS:,} may come")
    tensors: dict[str, Tensor] = {}
    for frame in frames:
        name = frame.name
        if not NAME.fullmatch(name) or "lora_" not in name or name in tensors:
            raise MessageError(f"{name[:80]!r} is no name of a LoRA weight, or twice there")
        if not 1 <= len(frame.shape) <= 2:
            raise FrameError(f"weight {name[:80]} has {len(frame.shape)} dimensions, an adapter's have two")
        tensor = decode_frame(frame, role, (None,) * len(frame.shape), checksum=checksum)
        if tensor.dtype != torch.float32:
            raise FrameError(f"weight {name[:80]} is {tensor.dtype}, adapters are sent as float32")
        tensors[name] = tensor
    return tensors
