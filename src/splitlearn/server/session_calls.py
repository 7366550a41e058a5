"""Calls that move a session: its keys and values out of this server, or in, a part at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from splitlearn.errors import MessageError, SplitLearnError
from splitlearn.server.client_stream import Hall
from splitlearn.server.refusal import Context, refuse, refusing
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.generated import splitlearn_pb2_grpc as rpc
from splitlearn.wire.handshake import client_id, identity_from_proto, require_same_model
from splitlearn.wire.sessions import ENDED, ArrivingParts, head_from_proto, head_to_proto, part_to_proto

MOVE_S = 600.0
Parts = AsyncIterator[pb.SessionPart]


class SessionCalls(rpc.TrunkServicer):
    """A session goes by parts, from its slots and into them: no more of it than one is held here."""

    _hall: Hall

    async def ExportSession(self, request: pb.ExportSessionRequest, context: Context) -> Parts:
        """What the session is, then all that it holds; it stays as it is."""
        moves = self._hall.engine.moves
        try:
            id = (client_id(request.client), request.session)
            head = await asyncio.wrap_future(moves.head(id, request.incarnation))
            with self._moving():
                yield head_to_proto(head, self._hall.identity)
                boxes = list(moves.boxes(head, self._hall.config.limits.chunk_bytes))
                for box in boxes:
                    part = await asyncio.wrap_future(moves.read(id, head, box, request.incarnation))
                    proto = await asyncio.to_thread(part_to_proto, part)
                    proto.last = box is boxes[-1]
                    yield proto
        except SplitLearnError as error:
            await refuse(context, error)

    @refusing
    async def ImportSession(self, requests: Parts, context: Context) -> pb.ImportSessionReply:
        """A session that can be gone on with from its step 1."""
        try:
            async with asyncio.timeout(MOVE_S):
                session = await self._imported(requests)
        except TimeoutError:
            raise MessageError(
                f"a session's parts did not come within {MOVE_S:g} s: import it again"
            ) from None
        return pb.ImportSessionReply(session=session, next_step=1)

    async def _imported(self, requests: Parts) -> int:
        moves = self._hall.engine.moves
        first = await _next(requests)
        id = (client_id(first.client), first.session)
        require_same_model(self._hall.identity, identity_from_proto(first.fingerprint))
        head = head_from_proto(first, self._hall.config.limits)
        try:
            await asyncio.wrap_future(moves.begin(id, head))
        except asyncio.CancelledError:
            # It may begin all the same; where it is refused instead, another import of this id is under way.
            moves.abandon(id)
            raise
        try:
            parts = ArrivingParts(head, moves.layers)
            while not parts.is_complete:
                part = await asyncio.to_thread(parts.take, await _next(requests))
                await asyncio.wrap_future(moves.write(id, part))
            await asyncio.wrap_future(moves.finish(id))
        except BaseException:
            # Also where the client is gone: nobody would close what nobody can use.
            moves.abandon(id)
            raise
        return id[1]

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """A server that stops lets it finish."""
        moving = object()
        self._hall.moving.add(moving)
        try:
            yield
        finally:
            self._hall.moving.discard(moving)


async def _next(requests: Parts) -> pb.SessionPart:
    try:
        return await anext(requests)
    except StopAsyncIteration:
        raise MessageError(ENDED) from None
