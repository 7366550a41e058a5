"""A message too large for one piece goes in several, over one connection or side by side over more.

A large tensor's bytes do not go through protobuf: the message travels without them, they follow it,
and each piece says how many they are. So each is copied once on its way out and once on its way in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from splitlearn.wire.checksum import checksum_of
from splitlearn.wire.generated import splitlearn_pb2 as pb

Message = TypeVar("Message", pb.ClientMessage, pb.ServerMessage)
VARINT, BYTES = 0, 2
STREAM_OPTIONS = (("grpc.http2.max_frame_size", 1 << 20), ("grpc.http2.lookahead_bytes", 32 << 20))
"""Both sides' gRPC settings for streams that carry large tensors; measured: a fifth faster."""
MORE = 0x80
MAX_VARINT, MAX_SIZE_VARINT = 10, 5
MAX_UINT64 = (1 << 64) - 1
CHUNK_FIELDS = {field.name: field.number for field in pb.Chunk.DESCRIPTOR.fields}
HEAD_FIELDS = {number << 3 | VARINT: name for name, number in CHUNK_FIELDS.items() if name != "data"}
DATA_FIELD = CHUNK_FIELDS["data"] << 3 | BYTES
NOTHING_FOUND = dict.fromkeys(HEAD_FIELDS.values(), 0)
CHUNK_OF = {
    kind: kind.DESCRIPTOR.fields_by_name["chunk"].number for kind in (pb.ClientMessage, pb.ServerMessage)
}


class Piece(NamedTuple):
    """A `pb.Chunk` whose data were not copied out of what arrived."""

    number: int
    data: memoryview
    total_bytes: int
    offset: int
    tensor_bytes: int
    checksum: int


# ---------------------------------------------------------------- out


class Pieces:
    """A serialised message and the bytes behind it, cut: what gRPC is to send.

    Several connections may iterate at once. Each piece is made, as it leaves, for one of them.
    """

    def __init__(
        self,
        kind: type[Message],
        number: int,
        message: bytes,
        payload: memoryview,
        chunk_bytes: int,
        *,
        checksum: bool,
    ) -> None:
        self._chunk_of = CHUNK_OF[kind]
        self._number = number
        self._message, self._payload = message, payload
        self._chunk_bytes, self._checksum = chunk_bytes, checksum
        self._total = len(message) + len(payload)
        # One iterator for all: its steps cannot be interrupted by another thread.
        self._starts = iter(range(0, self._total, chunk_bytes))

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.take, None)

    def take(self) -> bytes | None:
        """The next piece, for one connection; None where none is left."""
        start = next(self._starts, None)
        return None if start is None else self._piece(start, min(start + self._chunk_bytes, self._total))

    def _piece(self, start: int, stop: int) -> bytes:
        """Written as protobuf would write it, without its copies."""
        length = len(self._message)
        own = self._message[start:stop]
        behind = self._payload[max(start - length, 0) : max(stop - length, 0)]
        head = pb.Chunk(
            number=self._number,
            total_bytes=self._total,
            offset=start,
            tensor_bytes=len(self._payload),
            checksum=checksum_of(own, behind) if self._checksum else 0,
        ).SerializeToString()
        head += _tag(CHUNK_FIELDS["data"]) + _varint(stop - start)
        outer = _tag(self._chunk_of) + _varint(len(head) + stop - start)
        return b"".join((outer, head, own, behind))


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
    """None where these bytes are not one chunk in the form that we write: protobuf then reads them.

    In that form each field comes once at the most, so that little stands around the data, which stay where
    they are: what is held of a piece is what it carries, and reading it takes no time.
    """
    tag = _tag(CHUNK_OF[kind])
    if not data.startswith(tag):
        return None
    found: dict[str, int] = {}
    try:
        length, at = _read_varint(data, len(tag), MAX_SIZE_VARINT)
        if at + length != len(data):
            return None
        while (field := data[at]) != DATA_FIELD:
            name = HEAD_FIELDS[field]
            if name in found:
                return None
            found[name], at = _read_varint(data, at + 1)
        size, at = _read_varint(data, at + 1, MAX_SIZE_VARINT)
    except (IndexError, KeyError):
        return None
    if at + size != len(data):
        return None
    return Piece(data=memoryview(data)[at:], **(NOTHING_FOUND | found))


def _read_varint(data: bytes, at: int, most: int = MAX_VARINT) -> tuple[int, int]:
    """The number at this place, and the place behind it; raises IndexError where there is none."""
    value = 0
    for place in range(most):
        byte = data[at + place]
        value |= (byte & (MORE - 1)) << 7 * place
        if byte < MORE:
            if value > MAX_UINT64:
                raise IndexError
            return value, at + place + 1
    raise IndexError
