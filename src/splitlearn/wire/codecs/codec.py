"""What every codec promises."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, dtype


class Codec(Protocol):
    """Turns a contiguous CPU tensor into bytes and back.

    `encoded_bytes` is known from dtype and shape alone, so that a frame of another size is
    refused before any of it is read.
    """

    def encoded_bytes(self, kind: dtype, elements: int) -> int:
        """Bytes that a tensor of this dtype with this many elements takes."""
        ...

    def encode(self, tensor: Tensor) -> bytes:
        """The tensor's values in row-major order."""
        ...

    def encode_view(self, tensor: Tensor) -> memoryview:
        """The same without a copy where the values are sent as they lie: the tensor must stay as it is."""
        ...

    def decode_view(self, payload: Tensor, kind: dtype) -> Tensor:
        """As `decode`, of bytes (N,) that nobody else uses: the result may share them."""
        ...

    def decode(self, data: bytes, kind: dtype) -> Tensor:
        """A flat tensor of dtype `kind`; the caller has checked the size and gives it its shape."""
        ...
