"""One client's stream: its messages in order to the engine, the engine's answers back as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count

import structlog
from google.protobuf.message import DecodeError

from splitlearn.config import ServerConfig
from splitlearn.engine.engine import Engine
from splitlearn.errors import MessageError, SplitLearnError
from splitlearn.server.admission import Admission
from splitlearn.server.egress import Egress
from splitlearn.server.facts import facts_of
from splitlearn.vocabulary import CodecId
from splitlearn.wire.chunks import ChunkAssembly, chunks_of
from splitlearn.wire.frames import FrameFormat
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.handshake import ModelIdentity, welcome
from splitlearn.wire.messages import AnswerMessage
from splitlearn.wire.status import error_to_proto
from splitlearn.wire.steps import answer_to_proto, close_from_proto, fork_from_proto, step_from_proto

log = structlog.get_logger("splitlearn.server")
HELLO_S = 10.0


@dataclass(frozen=True, slots=True)
class Hall:
    """What all streams of one server share."""

    engine: Engine
    identity: ModelIdentity
    config: ServerConfig
    admission: Admission
    egress: Egress
    streams: set[ClientStream] = field(default_factory=set)


class ClientStream:
    """Lives as long as the stream; the sessions it opened outlive it until their lease runs out."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall
        self._limits = hall.config.limits
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[pb.ServerMessage | None] = asyncio.Queue()
        self._assembly = ChunkAssembly(self._limits.max_message_bytes)
        self._numbers = count(1)
        self._client = b""
        self._checksum = True
        self._unanswered = 0
        self._all_read = False

    async def messages(self, requests: AsyncIterator[pb.ClientMessage]) -> AsyncIterator[pb.ServerMessage]:
        """What goes back to the client, from its welcome to its last answer.

        Raises:
            SplitLearnError: the handshake failed; there is no stream.
        """
        yield pb.ServerMessage(welcome=await self._greet(requests))
        reader = asyncio.create_task(self._read(requests))
        self._hall.streams.add(self)
        try:
            while (message := await self._outbox.get()) is not None:
                yield message
        finally:
            self._hall.streams.discard(self)
            reader.cancel()

    def end(self, error: SplitLearnError) -> None:
        """Say why, and nothing more."""
        self._outbox.put_nowait(pb.ServerMessage(error=error_to_proto(error)))
        self._outbox.put_nowait(None)

    async def _greet(self, requests: AsyncIterator[pb.ClientMessage]) -> pb.Welcome:
        try:
            first = await asyncio.wait_for(anext(requests), HELLO_S)
        except (TimeoutError, StopAsyncIteration):
            raise MessageError(f"a stream begins with a Hello within {HELLO_S:g} s") from None
        if first.WhichOneof("content") != "hello":
            raise MessageError("a stream begins with a Hello")
        hall = self._hall
        answer = welcome(
            first.hello,
            hall.identity,
            facts_of(hall.engine, hall.identity),
            self._limits,
            checksum=hall.config.checksum,
            answer_window=hall.config.sessions.answer_window,
        )
        self._client = first.hello.client
        self._checksum = answer.checksum == pb.XXH3_64
        return answer

    async def _read(self, requests: AsyncIterator[pb.ClientMessage]) -> None:
        try:
            async for message in requests:
                self._take(message)
        except SplitLearnError as error:
            # What follows on this stream can no longer be told apart.
            self.end(error)
        finally:
            self._all_read = True
            self._close_if_done()

    def _take(self, message: pb.ClientMessage) -> None:
        match message.WhichOneof("content"):
            case "step":
                self._step(message.step)
            case "chunk":
                if (whole := self._assembly.add(message.chunk)) is not None:
                    self._take(_parse(whole))
            case "fork":
                self._fork(message.fork)
            case "close":
                self._hall.engine.close(self._client, close_from_proto(message.close))
            case other:
                raise MessageError(f"a client's message of kind {other} has no place here")

    def _step(self, proto: pb.Step) -> None:
        self._unanswered += 1
        try:
            hidden_size = self._hall.engine.trunk.hidden_size
            step = step_from_proto(proto, hidden_size, self._limits, checksum=self._checksum)
            format = FrameFormat(CodecId(proto.activation.codec), self._checksum)
            future = self._hall.engine.submit(self._client, step)
        except SplitLearnError as error:
            self._deliver([pb.ServerMessage(answer=pb.Answer(key=proto.key, error=error_to_proto(error)))])
        else:
            future.add_done_callback(lambda done: self._encode(done, format))

    def _encode(self, done: Future[AnswerMessage], format: FrameFormat) -> None:
        """On the engine's thread: hand over at once."""
        if not done.cancelled():
            self._send(lambda: pb.ServerMessage(answer=_encoded(done.result(), format)))

    def _fork(self, proto: pb.ForkSession) -> None:
        self._unanswered += 1
        try:
            future = self._hall.engine.fork(self._client, fork_from_proto(proto))
        except SplitLearnError as error:
            self._deliver([_forked(proto.into, error)])
        else:
            future.add_done_callback(lambda done: self._send(lambda: _forked(proto.into, done.exception())))

    def _send(self, make: Callable[[], pb.ServerMessage]) -> None:
        self._hall.egress.do(lambda: self._hand_over(self._in_pieces(make())))

    def _in_pieces(self, message: pb.ServerMessage) -> list[pb.ServerMessage]:
        if message.ByteSize() <= self._limits.chunk_bytes:
            return [message]
        pieces = chunks_of(next(self._numbers), message.SerializeToString(), self._limits.chunk_bytes)
        return [pb.ServerMessage(chunk=piece) for piece in pieces]

    def _hand_over(self, messages: list[pb.ServerMessage]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, messages)

    def _deliver(self, messages: list[pb.ServerMessage]) -> None:
        for message in messages:
            self._outbox.put_nowait(message)
        self._unanswered -= 1
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._all_read and not self._unanswered:
            self._outbox.put_nowait(None)


def _encoded(answer: AnswerMessage, format: FrameFormat) -> pb.Answer:
    """With the time that the copy from the device and the codec took."""
    started = time.perf_counter()
    proto = answer_to_proto(answer, format)
    if answer.activation_BTD is not None:
        proto.timings.copied_us = int((time.perf_counter() - started) * 1e6)
    return proto


def _forked(session: int, error: BaseException | None) -> pb.ServerMessage:
    forked = pb.Forked(session=session)
    if isinstance(error, SplitLearnError):
        forked.error.CopyFrom(error_to_proto(error))
    return pb.ServerMessage(forked=forked)


def _parse(whole: bytes) -> pb.ClientMessage:
    try:
        message = pb.ClientMessage.FromString(whole)
    except DecodeError:
        raise MessageError("the pieces of a message do not form one") from None
    if message.WhichOneof("content") == "chunk":
        raise MessageError("a message in pieces holds another in pieces")
    return message
