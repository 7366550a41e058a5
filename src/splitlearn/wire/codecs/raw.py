"""The values as they lie in memory, little-endian."""

from __future__ import annotations

import torch
from torch import Tensor

from splitlearn.errors import FrameError

CARRIERS = {torch.bfloat16: torch.int16}
"""What stands in for a dtype that numpy does not have; the bits are the same."""


class RawCodec:
    """Loses nothing: what is decoded equals what was encoded bit for bit."""

    def encoded_bytes(self, kind: torch.dtype, elements: int) -> int:
        return elements * kind.itemsize

    def encode(self, tensor: Tensor) -> bytes:
        carrier = CARRIERS.get(tensor.dtype)
        return (tensor if carrier is None else tensor.view(carrier)).numpy().tobytes()

    def encode_view(self, tensor: Tensor) -> memoryview:
        carrier = CARRIERS.get(tensor.dtype)
        flat = tensor.contiguous().view(-1)
        return memoryview((flat if carrier is None else flat.view(carrier)).numpy()).cast("B")  # type: ignore[arg-type]

    def decode_view(self, payload: Tensor, kind: torch.dtype) -> Tensor:
        return payload.view(kind)

    def decode(self, data: bytes, kind: torch.dtype) -> Tensor:
        if not data:
            return torch.empty(0, dtype=kind)
        # Torch computes on a bool's byte as it is: any other would be a truth of its own kind.
        if kind == torch.bool and data.translate(None, b"\0\1"):
            raise FrameError("a frame of true and false has bytes that are neither 1 nor 0")
        # A copy: torch would share the immutable bytes, and a write into them is undefined.
        return torch.frombuffer(bytearray(data), dtype=kind)
