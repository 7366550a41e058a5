"""float32 values sent as bfloat16: half the bytes, and a range that no activation leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from splitlearn.wire.codecs.raw import RawCodec


class HalfCodec:
    """Each value is off by at most 1/256 of itself; a 16-bit tensor goes as it is.

    bfloat16 and not float16, because channels of real models reach values that float16 rounds to
    infinity (245 after layer 2 of SmolLM2-135M; larger models go far beyond 65,504 in products).
    """

    def __init__(self) -> None:
        self._raw = RawCodec()

    def encoded_bytes(self, kind: torch.dtype, elements: int) -> int:
        return self._raw.encoded_bytes(_on_the_wire(kind), elements)

    def encode(self, tensor: Tensor) -> bytes:
        return self._raw.encode(tensor.to(_on_the_wire(tensor.dtype)))

    def encode_view(self, tensor: Tensor) -> memoryview:
        return self._raw.encode_view(tensor.to(_on_the_wire(tensor.dtype)))

    def decode_view(self, payload: Tensor, kind: torch.dtype) -> Tensor:
        return self._raw.decode_view(payload, _on_the_wire(kind)).to(kind)

    def decode(self, data: bytes, kind: torch.dtype) -> Tensor:
        return self._raw.decode(data, _on_the_wire(kind)).to(kind)


def _on_the_wire(kind: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if kind == torch.float32 else kind
