"""A message too large for one piece goes in several, and is put together under a size limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import DecodeError

from splitlearn.errors import MessageError
from splitlearn.wire.generated import splitlearn_pb2 as pb

Message = TypeVar("Message", pb.ClientMessage, pb.ServerMessage)


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


def chunks_of(number: int, data: bytes, chunk_bytes: int) -> Iterator[pb.Chunk]:
    """The pieces of one serialised message, in order; the first says how long the whole is."""
    for start in range(0, len(data), chunk_bytes):
        yield pb.Chunk(
            number=number,
            data=data[start : start + chunk_bytes],
            total_bytes=len(data) if start == 0 else 0,
            last=start + chunk_bytes >= len(data),
        )


class ChunkAssembly:
    """Puts the pieces of one stream's messages together, one message at a time.

    Memory grows with what has arrived, never with what was announced.
    """

    def __init__(self, max_message_bytes: int) -> None:
        self._max_bytes = max_message_bytes
        self._number = 0
        self._total = 0
        self._pieces: list[bytes] = []
        self._received = 0

    def add(self, chunk: pb.Chunk) -> bytes | None:
        """The whole message once its last piece is here, else None.

        Raises:
            MessageError: pieces of different messages are mixed, or the message is too large.
        """
        if not self._pieces:
            self._begin(chunk)
        elif chunk.number != self._number or chunk.total_bytes:
            raise MessageError("a new message began before the last piece of the one before it")
        self._pieces.append(chunk.data)
        self._received += len(chunk.data)
        if self._received > self._total or not chunk.data:
            raise MessageError(f"a message of {self._total} bytes came with {self._received} bytes of pieces")
        return self._finish() if chunk.last else None

    def _begin(self, chunk: pb.Chunk) -> None:
        if not 0 < chunk.total_bytes <= self._max_bytes:
            raise MessageError(
                f"a message of {chunk.total_bytes} bytes; this side takes 1 to {self._max_bytes}"
            )
        self._number, self._total, self._received = chunk.number, chunk.total_bytes, 0

    def _finish(self) -> bytes:
        whole = b"".join(self._pieces)
        self._pieces = []
        if len(whole) != self._total:
            raise MessageError(f"a message of {self._total} bytes ended after {len(whole)}")
        return whole
