"""Further connections of one client's stream: pieces of large messages, and what must come behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import structlog
from google.protobuf.message import DecodeError

from splitlearn.errors import CorruptFrame, MessageError, SplitLearnError, TrunkFailed
from splitlearn.server.outbox import Exit
from splitlearn.wire.chunks import Piece
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.handshake import PROTOCOL

if TYPE_CHECKING:
    from splitlearn.server.client_stream import ClientStream, Requests

log = structlog.get_logger("splitlearn.server")
ON_LANES = ("chunk", "close")
BREAKS_WITHIN_S = 0.05
BROKE = "a connection that carried a part of a message broke: try again"


class Lane:
    """Lives as long as its connection; what it brings goes to its stream, and comes from there.

    Raises:
        MessageError: no stream of this client has this ticket, or it has all lanes that it may have.
    """

    def __init__(self, stream: ClientStream | None, hello: pb.Hello, max_lanes: int) -> None:
        if stream is None or hello.client != stream.client:
            raise MessageError("no stream of this client has this ticket: it has ended, connect again")
        if len(stream.lanes) + 1 >= max_lanes:
            raise MessageError(f"a stream has at most {max_lanes} lanes here, its own included")
        self._stream = stream
        self._exit = Exit(stream.outbox, is_lane=True)

    async def messages(self, requests: Requests) -> AsyncIterator[pb.ServerMessage | bytes]:
        """What goes back on this connection, until either side ends it."""
        self._stream.lanes.add(self)
        reader = asyncio.create_task(self._read(requests))
        in_order = False
        try:
            yield pb.ServerMessage(welcome=pb.Welcome(protocol=PROTOCOL))
            while (piece := await self._exit.take()) is not None:
                yield piece
            in_order = True
        finally:
            reader.cancel()
            self._exit.leave()
            self._stream.lanes.discard(self)
            if not in_order:
                self._stream.end(CorruptFrame(BROKE))

    def end(self) -> None:
        """Once the piece has left that is on its way."""
        self._exit.shut()

    async def _read(self, requests: Requests) -> None:
        try:
            async for message in requests:
                if not isinstance(message, Piece) and message.WhichOneof("content") not in ON_LANES:
                    raise MessageError("a lane carries pieces of messages, and what closes a session, only")
                await self._stream.take(message)
            # A call that breaks ends its requests a moment before it says so.
            await asyncio.sleep(BREAKS_WITHIN_S)
        except Exception as error:
            self._stream.end(reason(error))
        finally:
            self.end()


def reason(error: Exception) -> SplitLearnError:
    """What a stream ends with of which a message could not be taken: nobody waits for its answer in vain."""
    if isinstance(error, SplitLearnError):
        return error
    if isinstance(error, DecodeError):
        return MessageError("what arrived is no message of this protocol")
    log.error("a client's message could not be taken", exc_info=error)
    return TrunkFailed("a message could not be taken; the server's log has the cause")
