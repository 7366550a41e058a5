"""One client's stream: its messages in order to the engine, the engine's answers back as they come."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor

from splitlearn.config import ServerConfig
from splitlearn.engine.checkpoint import RunStore
from splitlearn.engine.engine import Engine
from splitlearn.errors import CorruptFrame, MessageError, SplitLearnError
from splitlearn.server.admission import Admission
from splitlearn.server.answers import encoded, failed, forked, is_quick, not_encoded
from splitlearn.server.egress import Egress
from splitlearn.server.facts import facts_of
from splitlearn.server.handover import Handover
from splitlearn.server.lanes import Lane, reason
from splitlearn.server.outbox import Content, Exit, Outbox
from splitlearn.vocabulary import CodecId
from splitlearn.wire.assembly import CORRUPT, ChunkAssembly, Whole, parse
from splitlearn.wire.chunks import Piece, Pieces
from splitlearn.wire.frames import FrameFormat
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.handshake import ModelIdentity, welcome
from splitlearn.wire.messages import AnswerMessage, RunStepMessage, StepMessage
from splitlearn.wire.status import error_to_proto
from splitlearn.wire.steps import close_from_proto, fork_from_proto, run_step_from_proto, step_from_proto

HELLO_S = 10.0
TICKET_BYTES = 16
Decoded = StepMessage | RunStepMessage | SplitLearnError
Requests = AsyncIterator[pb.ClientMessage | Piece]


@dataclass(frozen=True, slots=True)
class Hall:
    """What all streams of one server share."""

    engine: Engine
    identity: ModelIdentity
    config: ServerConfig
    admission: Admission
    egress: Egress
    handover: Handover
    runs: RunStore
    streams: set[ClientStream] = field(default_factory=set)

    def lane(self, hello: pb.Hello) -> Lane:
        """A further connection of the stream that its ticket names; raises MessageError where none is."""
        tickets = {stream.ticket: stream for stream in self.streams}
        return Lane(tickets.get(hello.lane_of), hello, self.config.limits.lanes)


async def first_hello(requests: Requests) -> pb.Hello:
    """Raises MessageError where a stream does not begin with one, or not soon enough."""
    try:
        first = await asyncio.wait_for(anext(requests), HELLO_S)
    except (TimeoutError, StopAsyncIteration):
        raise MessageError(f"a stream begins with a Hello within {HELLO_S:g} s") from None
    if isinstance(first, Piece) or first.WhichOneof("content") != "hello":
        raise MessageError("a stream begins with a Hello")
    return first.hello


class ClientStream:
    """Lives as long as the stream; the sessions it opened outlive it until their lease runs out.

    Raises:
        SplitLearnError: the handshake failed; there is no stream.
    """

    def __init__(self, hall: Hall, hello: pb.Hello) -> None:
        self._hall = hall
        self._limits = hall.config.limits
        self.outbox = Outbox(self._settle)
        self._numbers = count(1)
        self._room = asyncio.Semaphore(hall.config.max_unanswered)
        self._all_read = False
        self.ticket = secrets.token_bytes(TICKET_BYTES)
        self._welcome = self._greet(hello)
        self._hidden_size = hall.engine.trunk.hidden_size
        self.client = hello.client
        self._checksum = self._welcome.checksum == pb.XXH3_64
        self._assembly = ChunkAssembly(self._limits.max_message_bytes, checksum=self._checksum)
        self.lanes: set[Lane] = set()
        """Further connections, over which large messages are spread."""
        self.owed = 0
        """Answers that the client waits for."""
        self.last_answer_at = time.monotonic()

    async def messages(self, requests: Requests) -> AsyncIterator[pb.ServerMessage | bytes]:
        """What goes back to the client, from its welcome to its last answer."""
        self._hall.streams.add(self)
        reader = asyncio.create_task(self._read(requests))
        exit = Exit(self.outbox)
        try:
            yield pb.ServerMessage(welcome=self._welcome)
            while (outgoing := await exit.take()) is not None:
                yield outgoing
        finally:
            reader.cancel()
            self._leave()

    def end(self, error: SplitLearnError) -> None:
        """Say why, and nothing more."""
        self.outbox.put(pb.ServerMessage(error=error_to_proto(error)), is_answer=False)
        self.outbox.end()

    def _greet(self, hello: pb.Hello) -> pb.Welcome:
        hall = self._hall
        return welcome(
            hello,
            hall.identity,
            facts_of(hall.engine, hall.identity),
            self._limits,
            checksum=hall.config.checksum,
            answer_window=hall.config.sessions.answer_window,
            ticket=self.ticket,
        )

    def _leave(self) -> None:
        """Sessions of a client that has no connection left are kept for a short while only."""
        for lane in self.lanes:
            lane.end()
        streams = self._hall.streams
        streams.discard(self)
        if not any(other.client == self.client for other in streams):
            self._hall.engine.leave(self.client)

    async def _read(self, requests: Requests) -> None:
        try:
            async for message in requests:
                await self.take(message)
        except Exception as error:
            # What follows on this stream can no longer be told apart.
            self.end(reason(error))
        finally:
            self._all_read = True
            self._close_if_done()

    async def take(self, message: pb.ClientMessage | Piece) -> None:
        """From this stream's own connection or from a lane, in the order of each."""
        if isinstance(message, Piece):
            await self._take_piece(message)
            return
        match message.WhichOneof("content"):
            case "step":
                await self._owe()
                self._submit(message.step, self._decode(message.step))
            case "chunk":
                await self._take_piece(message.chunk)
            case "fork":
                await self._owe()
                self._fork(message.fork)
            case "close":
                self._hall.engine.close(self.client, close_from_proto(message.close))
            case other:
                raise MessageError(f"a client's message of kind {other} has no place here")

    async def _take_piece(self, piece: pb.Chunk | Piece) -> None:
        """A large message's last piece: it is parsed and decoded beside the loop that serves the others."""
        if (whole := self._assembly.add(piece)) is None:
            return
        await self._owe()
        message, decoded = await asyncio.to_thread(self._finish, whole)
        if decoded is None:
            raise MessageError("only a step is large enough to come in pieces")
        self._submit(message.step, decoded)

    def _finish(self, whole: Whole) -> tuple[pb.ClientMessage, Decoded | None]:
        message = parse(pb.ClientMessage, whole.message)
        if message.WhichOneof("content") != "step":
            return message, None
        if not whole.is_intact:
            return message, CorruptFrame(CORRUPT)
        return message, self._decode(message.step, whole.payload)

    def _decode(self, proto: pb.Step, payload: Tensor | None = None) -> Decoded:
        decode = run_step_from_proto if proto.key.run else step_from_proto
        try:
            return decode(proto, self._hidden_size, self._limits, checksum=self._checksum, payload=payload)
        except SplitLearnError as error:
            return error

    def _submit(self, proto: pb.Step, decoded: Decoded) -> None:
        if isinstance(decoded, SplitLearnError):
            self._deliver(failed(proto.key, decoded))
            return
        format = FrameFormat(CodecId(proto.activation.codec), self._checksum)
        future = self._hall.engine.submit(self.client, decoded)
        future.add_done_callback(lambda done: self._send(done, format, proto.key))

    def _send(self, done: Future[AnswerMessage], format: FrameFormat, key: pb.StepKey) -> None:
        """On the engine's thread: hand over at once."""
        answer = done.result()
        if is_quick(answer):
            # Encoded where it is sent: waking one more thread would take longer.
            self._hall.handover.put(lambda: self._deliver(self._encode(answer, format, key)))
        else:
            apart = format.apart_if_large()
            self._hall.egress.do(lambda: self._hand_over(self._encode(answer, apart, key)))

    def _encode(self, answer: AnswerMessage, format: FrameFormat, key: pb.StepKey) -> Content:
        """An answer that cannot be encoded is an error that can: nobody waits for what never comes."""
        try:
            message = encoded(answer, format)
            return self._in_pieces(message, format.apart[0] if format.apart else None)
        except Exception as error:
            return not_encoded(key, error)

    def _fork(self, proto: pb.ForkSession) -> None:
        try:
            future = self._hall.engine.fork(self.client, fork_from_proto(proto))
        except SplitLearnError as error:
            self._deliver(forked(proto.into, error))
        else:
            future.add_done_callback(lambda done: self._hand_over(forked(proto.into, done.exception())))

    def _in_pieces(self, message: pb.ServerMessage, payload: memoryview | None) -> Content:
        """Made as they leave, not all at once."""
        if payload is None and message.ByteSize() <= self._limits.chunk_bytes:
            return message
        return Pieces(
            pb.ServerMessage,
            next(self._numbers),
            message.SerializeToString(),
            payload or memoryview(b""),
            self._limits.chunk_bytes,
            checksum=self._checksum,
        )

    def _hand_over(self, content: Content) -> None:
        self._hall.handover.put(lambda: self._deliver(content))

    def _deliver(self, content: Content) -> None:
        self.outbox.put(content, is_answer=True)

    async def _owe(self) -> None:
        """Wait for room: a client that does not read its answers is not read either."""
        await self._room.acquire()
        self.owed += 1

    def _settle(self) -> None:
        self.owed -= 1
        self._room.release()
        self.last_answer_at = time.monotonic()
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._all_read and not self.owed:
            self.outbox.end()
