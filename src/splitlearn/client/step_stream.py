"""One bidirectional stream: requests out in order, answers matched to who waits for them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from itertools import count
from queue import SimpleQueue
from typing import Any

import grpc
from torch import Tensor

from splitlearn.client.grpc_errors import error_of
from splitlearn.client.transport import Traffic
from splitlearn.config import WireLimits
from splitlearn.errors import MessageError, SplitLearnError, StepTimeout, TrunkUnreachable
from splitlearn.vocabulary import StepKey
from splitlearn.wire.chunks import (
    ChunkAssembly,
    Piece,
    deserialize_server,
    parse,
    pieces_with_payload,
    serialize,
)
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.handshake import Agreement
from splitlearn.wire.status import error_from_proto
from splitlearn.wire.steps import key_from_proto

WELCOME = "welcome"
CLOSE_S = 2.0
STEPS = f"/{pb.DESCRIPTOR.services_by_name['Trunk'].full_name}/Steps"


class StepStream:
    """Any thread may ask; one thread reads. A stream that broke answers everybody with the reason."""

    def __init__(self, channel: grpc.Channel, address: str, limits: WireLimits, traffic: Traffic) -> None:
        self._address = address
        self._channel = channel
        self._chunk_bytes = limits.chunk_bytes
        self._max_bytes = limits.max_message_bytes
        self._traffic = traffic
        self._outgoing: SimpleQueue[pb.ClientMessage | Iterable[bytes] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: dict[StepKey | int | str, Future[Any]] = {}
        self._broken: SplitLearnError | None = None
        self._is_welcome = False
        self._agreement: Agreement | None = None
        self._numbers = count(1)
        self._call: Any = channel.stream_stream(
            STEPS, request_serializer=serialize, response_deserializer=deserialize_server
        )(self._requests())
        self._reader = threading.Thread(target=self._read, name="splitlearn answers", daemon=True)
        self._reader.start()

    def greet(self, hello: pb.Hello, timeout_s: float) -> pb.Welcome:
        """The server's welcome; raises what it refuses with, or TrunkUnreachable."""
        welcome: pb.Welcome = self._ask(WELCOME, pb.ClientMessage(hello=hello), timeout_s)
        return welcome

    @property
    def agreement(self) -> Agreement:
        """What the handshake came to."""
        assert self._agreement is not None, "the handshake comes first"
        return self._agreement

    def keep_to(self, agreed: Agreement) -> None:
        """Send no larger messages, and no larger pieces of them, than the server said it takes."""
        self._agreement = agreed
        self._chunk_bytes = min(self._chunk_bytes, agreed.chunk_bytes)
        self._max_bytes = min(self._max_bytes, agreed.max_message_bytes)

    def step(
        self, key: StepKey, step: pb.Step, timeout_s: float, payload: memoryview | None = None
    ) -> tuple[pb.Answer, Tensor | None]:
        """The answer, and its tensor's bytes (N,) if they came behind it; `payload` goes behind the step."""
        answer: tuple[pb.Answer, Tensor | None] = self._ask(
            key, pb.ClientMessage(step=step), timeout_s, payload
        )
        return answer

    def fork(self, fork: pb.ForkSession, timeout_s: float) -> pb.Forked:
        forked: pb.Forked = self._ask(fork.into, pb.ClientMessage(fork=fork), timeout_s)
        return forked

    def tell(self, message: pb.ClientMessage) -> None:
        """Send without waiting for anything; on a stream that broke there is nobody to tell."""
        if not self.is_broken:
            self._outgoing.put(message)

    def close(self, *, wait: bool) -> None:
        """End the stream; with `wait` once the server has read what was told."""
        self._outgoing.put(None)
        # A finalizer may run on any thread, this stream's own reader among them.
        if wait and threading.current_thread() is not self._reader:
            self._reader.join(CLOSE_S)
        self._break(TrunkUnreachable(f"the connection to {self._address} was closed here"))

    def cancel(self) -> None:
        """End the stream at once, whatever is on its way."""
        self._call.cancel()

    @property
    def is_broken(self) -> bool:
        return self._broken is not None

    def _ask(
        self,
        name: StepKey | int | str,
        message: pb.ClientMessage,
        timeout_s: float,
        payload: memoryview | None = None,
    ) -> Any:
        future: Future[Any] = Future()
        sent = self._in_pieces(message, payload)
        with self._lock:
            if self._broken is not None:
                raise self._broken.again()
            self._waiting[name] = future
            self._outgoing.put(sent)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            raise StepTimeout(
                f"{self._address} did not answer within {timeout_s:g} s: it may be overloaded or cut off; "
                "try again, or allow more time (decode_s, prefill_s)"
            ) from None
        finally:
            with self._lock:
                self._waiting.pop(name, None)

    def _in_pieces(
        self, message: pb.ClientMessage, payload: memoryview | None
    ) -> pb.ClientMessage | Iterable[bytes]:
        behind = 0 if payload is None else len(payload)
        size = message.ByteSize() + behind
        if size > self._max_bytes:
            raise MessageError(
                f"a message of {size:,} bytes, {self._address} takes {self._max_bytes:,}: "
                "use fewer rows, a shorter text, or codec='half'"
            )
        self._traffic.count(_tensor_bytes(message) + behind, size)
        if size <= self._chunk_bytes and payload is None:
            return message
        return pieces_with_payload(
            pb.ClientMessage,
            next(self._numbers),
            message.SerializeToString(),
            payload or memoryview(b""),
            self._chunk_bytes,
        )

    def _requests(self) -> Iterator[pb.ClientMessage | bytes]:
        """On gRPC's sending thread: pieces are made as they leave, not all at once."""
        while (outgoing := self._outgoing.get()) is not None:
            if isinstance(outgoing, pb.ClientMessage):
                yield outgoing
            else:
                yield from outgoing

    def _read(self) -> None:
        assembly = ChunkAssembly(self._max_bytes)
        try:
            for message in self._call:
                self._take(message, assembly)
            self._break(
                TrunkUnreachable(f"{self._address} ended the connection: is the server still running?")
            )
        except grpc.RpcError as error:
            self._break(error_of(error, self._address, connected=self._is_welcome))
        except SplitLearnError as error:
            self._break(error)
        except Exception as error:
            self._break(MessageError(f"{self._address} sent what cannot be read ({error}): try again"))
        finally:
            # So that gRPC's own sending thread ends, too.
            self._outgoing.put(None)
            self._call.cancel()
            self._channel.close()

    def _take(self, message: pb.ServerMessage | Piece, assembly: ChunkAssembly) -> None:
        if isinstance(message, Piece) or message.WhichOneof("content") == "chunk":
            piece = message if isinstance(message, Piece) else message.chunk
            if (whole := assembly.add(piece)) is not None:
                self._take_whole(parse(pb.ServerMessage, whole.message), whole.payload)
        else:
            self._take_whole(message, None)

    def _take_whole(self, message: pb.ServerMessage, payload: Tensor | None) -> None:
        match message.WhichOneof("content"):
            case "answer":
                behind = 0 if payload is None else payload.numel()
                self._traffic.count(
                    _tensor_bytes(message) + behind, message.ByteSize() + behind, received=True
                )
                self._give(key_from_proto(message.answer.key), (message.answer, payload))
            case "welcome":
                self._is_welcome = True
                self._give(WELCOME, message.welcome)
            case "forked":
                self._give(message.forked.session, message.forked)
            case "error":
                raise error_from_proto(message.error)
            case other:
                raise MessageError(f"a server's message of kind {other} is not in the protocol")

    def _give(self, name: StepKey | int | str, value: Any) -> None:
        with self._lock:
            future = self._waiting.pop(name, None)
        # Nobody waits any more where a deadline passed before the answer came.
        if future is not None:
            future.set_result(value)

    def _break(self, error: SplitLearnError) -> None:
        with self._lock:
            self._broken = self._broken or error
            waiting, self._waiting = list(self._waiting.values()), {}
        for future in waiting:
            future.set_exception(error.again())


def _tensor_bytes(message: pb.ClientMessage | pb.ServerMessage) -> int:
    holder = message.step if isinstance(message, pb.ClientMessage) else message.answer
    return len(holder.activation.data)
