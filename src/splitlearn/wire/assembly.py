"""Pieces that arrive in any order become messages again, under a limit of size."""

from __future__ import annotations

import threading
from typing import NamedTuple

from google.protobuf.message import DecodeError
from torch import Tensor

from splitlearn.errors import CorruptFrame, MessageError
from splitlearn.wire.checksum import checksum_of
from splitlearn.wire.chunks import Message, Piece
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.host_memory import host_buffer

ALIGNMENT = 64
AHEAD = 4
SMALL_PIECES = 4096
"""So many pieces of messages that are not whole may be of any size ..."""
LEAST_PIECE_BYTES = 4 << 10
"""... and all further ones must be so large on average: what is noted of each is far less."""
CORRUPT = "a piece of a message does not match its checksum, the network or a memory changed it: try again"


class Whole(NamedTuple):
    """A serialised message, and the bytes (N,) of its tensor if they came behind it."""

    message: bytes
    payload: Tensor | None
    is_intact: bool = True
    """Whether the tensor's bytes are those that were sent."""


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


class ChunkAssembly:
    """Puts the pieces of one stream's messages together; any thread may bring one.

    Memory grows with what has arrived, to at most `AHEAD` times as much, never with what was announced nor
    with the number of pieces.
    """

    def __init__(self, max_message_bytes: int, *, checksum: bool = True) -> None:
        self._max_bytes = max_message_bytes
        self._checksum = checksum
        self._lock = threading.Lock()
        self._begun: dict[int, _Begun] = {}
        self._pieces, self._arrived = 0, 0

    def add(self, piece: pb.Chunk | Piece) -> Whole | None:
        """The whole message once its last piece is here, else None.

        Raises:
            MessageError: the piece does not fit the others, its message is too large, or too many are small.
            CorruptFrame: a message was changed on its way, and not only its tensor.
        """
        is_intact = not self._checksum or checksum_of(piece.data) == piece.checksum
        with self._lock:
            begun = self._begun.get(piece.number) or self._begin(piece)
            begun.take(piece, is_intact)
            self._count(1, len(piece.data))
            if begun.missing:
                return None
            del self._begun[piece.number]
            self._count(-begun.pieces, -begun.total)
        return begun.whole()

    def _count(self, pieces: int, arrived: int) -> None:
        self._pieces += pieces
        self._arrived += arrived
        if self._pieces > SMALL_PIECES + self._arrived // LEAST_PIECE_BYTES:
            raise MessageError(
                f"{self._pieces} pieces of messages with {self._arrived} bytes in all: send larger pieces "
                f"(limits.chunk_bytes, {LEAST_PIECE_BYTES} or more)"
            )

    def _begin(self, piece: pb.Chunk | Piece) -> _Begun:
        total, tensor = piece.total_bytes, piece.tensor_bytes
        if not 0 < total <= self._max_bytes:
            raise MessageError(f"a message of {total} bytes; this side takes 1 to {self._max_bytes}")
        if tensor >= total:
            raise MessageError(f"{tensor} bytes of a tensor in {total} of a message")
        together = total + sum(each.total for each in self._begun.values())
        if together > 2 * self._max_bytes:
            raise MessageError(
                f"{together} bytes of messages have begun, this side takes {2 * self._max_bytes} at once: "
                "send fewer side by side"
            )
        begun = self._begun[piece.number] = _Begun(total, tensor)
        return begun


class _Begun:
    """A message of which some pieces are here."""

    def __init__(self, total: int, tensor: int) -> None:
        self.total, self.missing = total, total
        self._tensor = tensor
        # So that the tensor behind the message lies where any dtype may lie.
        self._pad = (tensor - total) % ALIGNMENT
        self._ends: dict[int, int] = {}
        self._waiting: list[tuple[int, bytes | memoryview]] = []
        self._buffer: Tensor | None = None
        self._is_intact = True

    def take(self, piece: pb.Chunk | Piece, is_intact: bool) -> None:
        size, start = len(piece.data), piece.offset
        if (piece.total_bytes, piece.tensor_bytes) != (self.total, self._tensor):
            raise MessageError("the pieces of a message disagree on its size")
        if not 0 < size <= self.missing or start + size > self.total or start in self._ends:
            raise MessageError(f"a piece of {size} bytes at {start} of {self.total} does not fit the others")
        if not is_intact:
            self._spoil(start)
        self._ends[start] = start + size
        self._waiting.append((start, piece.data))
        self.missing -= size
        if (self.total - self.missing) * AHEAD >= self.total:
            self._place()

    @property
    def pieces(self) -> int:
        return len(self._ends)

    def whole(self) -> Whole:
        """Raises MessageError where pieces overlapped, so that something was never sent."""
        # Where each piece begins at 0 or where another ends, and the lengths add up, there is no gap.
        if not self._ends.keys() - {0} <= set(self._ends.values()):
            raise MessageError("pieces of a message overlap")
        assert self._buffer is not None
        message = self._buffer[self._pad : self._pad + self.total - self._tensor]
        payload = self._buffer[self._pad + self.total - self._tensor :] if self._tensor else None
        return Whole(message.numpy().tobytes(), payload, self._is_intact)

    def _spoil(self, start: int) -> None:
        """A tensor can be asked for again; of a message that was changed not even its key is known."""
        if start < self.total - self._tensor:
            raise CorruptFrame(CORRUPT)
        self._is_intact = False

    def _place(self) -> None:
        if self._buffer is None:
            self._buffer = host_buffer(self._pad + self.total)
        target = memoryview(self._buffer.numpy())  # type: ignore[arg-type]
        for start, data in self._waiting:
            at = self._pad + start
            target[at : at + len(data)] = data
        self._waiting.clear()
