"""A tensor on the wire: encoded with its checksum, and checked field by field before torch sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from splitlearn.errors import CorruptFrame, FrameError
from splitlearn.vocabulary import CodecId, Role
from splitlearn.wire.checksum import checksum_of
from splitlearn.wire.codecs import codec_of
from splitlearn.wire.dtypes import FLOATS, dtype_name
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.host_memory import to_host

APART_BYTES = 256 << 10
MAX_RANK = 4
MAX_DIMENSION = 1 << 31

DTYPES: dict[pb.DType, torch.dtype] = {
    pb.FLOAT32: torch.float32,
    pb.BFLOAT16: torch.bfloat16,
    pb.FLOAT16: torch.float16,
    pb.INT64: torch.int64,
    pb.INT32: torch.int32,
    pb.UINT8: torch.uint8,
    pb.INT8: torch.int8,
    pb.BOOL: torch.bool,
}
DTYPE_IDS = {kind: wire_id for wire_id, kind in DTYPES.items()}

DTYPES_OF_ROLE: dict[Role, frozenset[torch.dtype]] = {
    Role.MASK_COLUMNS: frozenset({torch.bool}),
    Role.POSITIONS: frozenset({torch.int32}),
    Role.SEGMENT_IDS: frozenset({torch.int32}),
}
ROLE_IDS: dict[Role, pb.Role] = {role: getattr(pb, role.name) for role in Role}
CODEC_IDS: dict[CodecId, pb.Codec] = {codec: getattr(pb, codec.name) for codec in CodecId}
NAME_OF_ROLE = {role: role.name.lower().replace("_", " ") for role in Role}


@dataclass(frozen=True, slots=True)
class FrameFormat:
    """How the two sides agreed to write tensors down."""

    codec: CodecId = CodecId.RAW
    checksum: bool = True
    apart: list[memoryview] | None = field(default=None, compare=False, hash=False)
    """Where the bytes of a large tensor go, in place of its frame."""

    def apart_if_large(self) -> FrameFormat:
        return FrameFormat(self.codec, self.checksum, [])


def encode_frame(tensor: Tensor, role: Role, format: FrameFormat) -> pb.Frame:
    """The tensor as a frame; side tensors (masks, positions) always go raw."""
    frame = pb.Frame()
    write_frame(frame, tensor, role, format)
    return frame


def write_frame(frame: pb.Frame, tensor: Tensor, role: Role, format: FrameFormat) -> None:
    """`encode_frame` into a message's own empty frame, which spares the bytes a copy."""
    codec_id = format.codec if tensor.dtype in FLOATS else CodecId.RAW
    codec = codec_of(codec_id)
    host = to_host(tensor)
    if format.apart is not None and host.nbytes >= APART_BYTES:
        format.apart.append(codec.encode_view(host))
    else:
        data = codec.encode(host)
        frame.data = data
        frame.checksum = checksum_of(data) if format.checksum else 0
    frame.dtype = DTYPE_IDS[tensor.dtype]
    frame.shape.extend(tensor.shape)
    frame.role = ROLE_IDS[role]
    frame.codec = CODEC_IDS[codec_id]


def decode_frame(
    frame: pb.Frame,
    role: Role,
    shape: Sequence[int | None],
    *,
    checksum: bool = True,
    payload: Tensor | None = None,
) -> Tensor:
    """The frame's tensor, on the CPU.

    Args:
        frame: what arrived; nothing in it is trusted.
        role: what the field that held the frame is for.
        shape: the expected shape; `None` stands for a length that the caller checks afterwards.
        checksum: whether the handshake agreed on one; a frame without it is then refused.
        payload: the bytes (N,) that came behind the frame's message, in pieces that had checksums of
            their own; the tensor may then share them.

    Raises:
        FrameError: role, dtype, rank, shape, codec or size is not what it may be.
        CorruptFrame: the bytes are not those that were sent.
    """
    if frame.role != ROLE_IDS[role]:
        raise FrameError(f"the {NAME_OF_ROLE[role]} frame says it is {_role_name(frame.role)}")
    name = NAME_OF_ROLE[role]
    kind = _dtype(frame, role)
    told = tuple(frame.shape)
    _check_shape(told, shape, name)
    codec = codec_of(_codec_id(frame.codec))
    expected = codec.encoded_bytes(kind, math.prod(told))
    # Read once: protobuf copies it each time.
    data = frame.data
    if payload is not None and data:
        raise FrameError(f"the {name} frame has bytes of its own and others behind its message")
    size = len(data) if payload is None else payload.numel()
    if size != expected:
        raise FrameError(
            f"the {name} frame has {size} bytes, its shape {list(told)} in {kind} takes {expected}"
        )
    if checksum and payload is None and checksum_of(data) != frame.checksum:
        raise CorruptFrame(
            f"the {name} frame does not match its checksum, the network or a memory changed it: try again"
        )
    flat = codec.decode(data, kind) if payload is None else codec.decode_view(payload, kind)
    return flat.view(told)


def _dtype(frame: pb.Frame, role: Role) -> torch.dtype:
    try:
        kind = DTYPES[frame.dtype]
    except KeyError:
        raise FrameError(f"dtype {frame.dtype} is not in the protocol") from None
    allowed = DTYPES_OF_ROLE.get(role, FLOATS)
    if kind not in allowed:
        wanted = " or ".join(sorted(map(dtype_name, allowed)))
        raise FrameError(f"the {NAME_OF_ROLE[role]} frame is {dtype_name(kind)}, it must be {wanted}")
    return kind


def _check_shape(shape: tuple[int, ...], expected: Sequence[int | None], name: str) -> None:
    if shape == tuple(expected):
        return
    if len(shape) > MAX_RANK or any(length >= MAX_DIMENSION for length in shape):
        raise FrameError(f"the {name} frame has shape {list(shape)[:8]}, which no step has")
    fits = len(shape) == len(expected) and all(
        wanted is None or length == wanted for length, wanted in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted_text = ", ".join("any" if length is None else str(length) for length in expected)
        raise FrameError(f"the {name} frame has shape {list(shape)}, expected [{wanted_text}]")


def _codec_id(value: int) -> CodecId:
    try:
        return CodecId(value)
    except ValueError:
        raise FrameError(f"codec {value} is not in the protocol") from None


def _role_name(value: int) -> str:
    try:
        return NAME_OF_ROLE[Role(value)]
    except ValueError:
        return f"role {value}, which is not in the protocol"
