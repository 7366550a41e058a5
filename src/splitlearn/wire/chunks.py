"""A message too large for one piece goes in several, and is put together under a size limit.

A large tensor's bytes do not go through protobuf: the message travels without them, they follow it,
and the first piece says how many they are. So each is copied once on its way out and once on its way in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from google.protobuf.message import DecodeError
from torch import Tensor

from splitlearn.errors import MessageError
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.host_memory import host_buffer

Message = TypeVar("Message", pb.ClientMessage, pb.ServerMessage)
VARINT, BYTES = 0, 2
STREAM_OPTIONS = (("grpc.http2.max_frame_size", 1 << 20), ("grpc.http2.lookahead_bytes", 32 << 20))
"""Both sides' gRPC settings for streams that carry large tensors; measured: a fifth faster."""
MORE = 0x80
MAX_VARINT = 10
CHUNK_FIELDS = {field.name: field.number for field in pb.Chunk.DESCRIPTOR.fields}
CHUNK_OF = {
    kind: kind.DESCRIPTOR.fields_by_name["chunk"].number for kind in (pb.ClientMessage, pb.ServerMessage)
}


class Piece(NamedTuple):
    """A `pb.Chunk` whose data were not copied out of what arrived."""

    number: int
    data: memoryview
    total_bytes: int
    last: bool
    tensor_bytes: int


class Whole(NamedTuple):
    """A serialised message, and the bytes (N,) of its tensor if they came behind it."""

    message: bytes
    payload: Tensor | None


def parse(kind: type[Message], whole: bytes) -> Message:
    """The message that came in pieces.

    Raises:
        MessageError: the pieces form none, or one that says it comes in pieces itself.
    """
    try:
        message = kind.FromString(whole)
    except DecodeError:
        raise MessageError("the pieces of a message do not form one") from None
    if message.WhichOneof("content") == "chunk":
        raise MessageError("a message in pieces holds another in pieces")
    return message


# ---------------------------------------------------------------- out


def pieces_with_payload(
    kind: type[Message], number: int, message: bytes, payload: memoryview, chunk_bytes: int
) -> Iterator[bytes]:
    """The pieces of a message and of the bytes behind it, each serialised: what gRPC is to send."""
    total = len(message) + len(payload)
    for start in range(0, total, chunk_bytes):
        stop = min(start + chunk_bytes, total)
        head = pb.Chunk(
            number=number,
            total_bytes=total if start == 0 else 0,
            tensor_bytes=len(payload) if start == 0 else 0,
            last=stop == total,
        ).SerializeToString()
        head += _tag(CHUNK_FIELDS["data"]) + _varint(stop - start)
        outer = _tag(CHUNK_OF[kind]) + _varint(len(head) + stop - start)
        own = message[start:stop]
        behind = payload[max(start - len(message), 0) : max(stop - len(message), 0)]
        yield b"".join((outer, head, own, behind))


def serialize(message: Message | bytes) -> bytes:
    """For gRPC: a message, or a piece that is serialised already."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def _tag(field: int) -> bytes:
    return _varint(field << 3 | BYTES)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= MORE:
        encoded.append(value & (MORE - 1) | MORE)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


# ---------------------------------------------------------------- in


def deserialize_client(data: bytes) -> pb.ClientMessage | Piece:
    """For gRPC: a client's message; a piece without copying what it carries."""
    return _piece(pb.ClientMessage, data) or pb.ClientMessage.FromString(data)


def deserialize_server(data: bytes) -> pb.ServerMessage | Piece:
    return _piece(pb.ServerMessage, data) or pb.ServerMessage.FromString(data)


def _piece(kind: type[Message], data: bytes) -> Piece | None:
    """None where these bytes are not one chunk in the form that we write: protobuf then reads them."""
    tag = _tag(CHUNK_OF[kind])
    if not data.startswith(tag):
        return None
    found = {"number": 0, "total_bytes": 0, "last": 0, "tensor_bytes": 0}
    names = {number << 3 | VARINT: name for name, number in CHUNK_FIELDS.items() if name in found}
    try:
        length, at = _read_varint(data, len(tag))
        if at + length != len(data):
            return None
        while True:
            field, at = _read_varint(data, at)
            value, at = _read_varint(data, at)
            if field == CHUNK_FIELDS["data"] << 3 | BYTES:
                break
            found[names[field]] = value
    except (IndexError, KeyError):
        return None
    if at + value != len(data):
        return None
    content = memoryview(data)[at:]
    return Piece(found["number"], content, found["total_bytes"], bool(found["last"]), found["tensor_bytes"])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at this place, and the place behind it; raises IndexError where there is none."""
    value = 0
    for place in range(MAX_VARINT):
        byte = data[at + place]
        value |= (byte & (MORE - 1)) << 7 * place
        if byte < MORE:
            return value, at + place + 1
    raise IndexError


class ChunkAssembly:
    """Puts the pieces of one stream's messages together, one message at a time.

    Memory grows with what has arrived, never with what was announced.
    """

    def __init__(self, max_message_bytes: int) -> None:
        self._max_bytes = max_message_bytes
        self._number = 0
        self._total = 0
        self._tensor = 0
        self._pieces: list[bytes | memoryview] = []
        self._received = 0

    def add(self, chunk: pb.Chunk | Piece) -> Whole | None:
        """The whole message once its last piece is here, else None.

        Raises:
            MessageError: pieces of different messages are mixed, or the message is too large.
        """
        data = chunk.data
        if not self._pieces:
            self._begin(chunk)
        elif chunk.number != self._number or chunk.total_bytes:
            raise MessageError("a new message began before the last piece of the one before it")
        self._pieces.append(data)
        self._received += len(data)
        if self._received > self._total or not data:
            raise MessageError(f"a message of {self._total} bytes came with {self._received} bytes of pieces")
        return self._finish() if chunk.last else None

    def _begin(self, chunk: pb.Chunk | Piece) -> None:
        if not 0 < chunk.total_bytes <= self._max_bytes:
            raise MessageError(
                f"a message of {chunk.total_bytes} bytes; this side takes 1 to {self._max_bytes}"
            )
        if chunk.tensor_bytes > chunk.total_bytes:
            raise MessageError(f"{chunk.tensor_bytes} bytes of a tensor in {chunk.total_bytes} of a message")
        self._number, self._total, self._received = chunk.number, chunk.total_bytes, 0
        self._tensor = chunk.tensor_bytes

    def _finish(self) -> Whole:
        pieces, self._pieces = self._pieces, []
        if self._received != self._total:
            raise MessageError(f"a message of {self._total} bytes ended after {self._received}")
        if not self._tensor:
            return Whole(b"".join(pieces), None)
        message, payload = bytearray(self._total - self._tensor), host_buffer(self._tensor)
        target, at = memoryview(payload.numpy()), 0  # type: ignore[arg-type]
        for data in pieces:
            piece = memoryview(data)
            own = piece[: max(len(message) - at, 0)]
            message[at : at + len(own)] = own
            rest = piece[len(own) :]
            start = at + len(own) - len(message)
            if rest:
                target[start : start + len(rest)] = rest
            at += len(piece)
        return Whole(bytes(message), payload)
