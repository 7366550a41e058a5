"""One stream to the trunk: requests out in order, answers matched to who waits for them.

What is large goes over several connections side by side, its lanes, made when the first such message leaves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from typing import Any

import grpc
import structlog
from torch import Tensor

from splitlearn.client.lane import Incoming, Lane, Outgoing
from splitlearn.client.transport import Traffic
from splitlearn.config import WireLimits
from splitlearn.errors import CorruptFrame, MessageError, SplitLearnError, StepTimeout, TrunkUnreachable
from splitlearn.vocabulary import StepKey
from splitlearn.wire.assembly import CORRUPT, ChunkAssembly, Whole, parse
from splitlearn.wire.chunks import Piece, Pieces
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.handshake import Agreement, joining
from splitlearn.wire.status import error_from_proto
from splitlearn.wire.steps import key_from_proto

CLOSE_S = 2.0
LANES_FROM_BYTES = 4 << 20
"""What a message must weigh to be worth more than one connection."""
log = structlog.get_logger("splitlearn.client")


class StepStream:
    """Any thread may ask; a stream of which one connection broke answers everybody with the reason.

    Args:
        open_channel: a connection to the trunk, not shared with others.
        address: for errors.
        limits: what this side sends and takes.
        traffic: where bytes are counted.
    """

    def __init__(
        self, open_channel: Callable[[], grpc.Channel], address: str, limits: WireLimits, traffic: Traffic
    ) -> None:
        self._open_channel = open_channel
        self._address = address
        self._limits = limits
        self._traffic = traffic
        # The garbage collector may end the stream at any place, within the lock too.
        self._lock = threading.RLock()
        self._waiting: dict[StepKey | int, Future[Any]] = {}
        self._broken: SplitLearnError | None = None
        self._agreement: Agreement | None = None
        self._numbers = count(1)
        self._hello = pb.Hello()
        self._greet_s = 0.0
        self._widening = threading.Lock()
        self._is_wide = False
        self._lanes = [self._new_lane()]

    def greet(self, hello: pb.Hello, timeout_s: float) -> pb.Welcome:
        """The server's welcome; raises what it refuses with, or StepTimeout, TrunkUnreachable."""
        self._hello, self._greet_s = hello, timeout_s
        try:
            return self._lanes[0].greet(hello, timeout_s)
        except TimeoutError:
            raise StepTimeout(f"{self._address} did not answer within {timeout_s:g} s") from None

    @property
    def agreement(self) -> Agreement:
        """What the handshake came to."""
        assert self._agreement is not None, "the handshake comes first"
        return self._agreement

    def keep_to(self, agreed: Agreement) -> None:
        """Send no larger messages, and no larger pieces of them, than the server said it takes."""
        limits = self._limits
        self._agreement = agreed
        self._limits = limits.model_copy(
            update={
                "chunk_bytes": min(limits.chunk_bytes, agreed.chunk_bytes),
                "max_message_bytes": min(limits.max_message_bytes, agreed.max_message_bytes),
                "lanes": min(limits.lanes, agreed.lanes),
            }
        )
        self._assembly = ChunkAssembly(limits.max_message_bytes, checksum=agreed.checksum)

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
        """Send behind all that was sent, without waiting; on a stream that broke there is nobody to tell.

        Over every lane, so that it comes after the last piece, whichever brings that. Takes no lock: the
        garbage collector may call this at any place.
        """
        if not self.is_broken:
            for lane in self._open_lanes():
                lane.send(message)

    def close(self, *, wait: bool) -> None:
        """End the stream; with `wait` once the server has read what was told."""
        self._finish()
        if wait:
            self._lanes[0].join(CLOSE_S)
        self._break(TrunkUnreachable(f"the connection to {self._address} was closed here"))
        # Those that were being opened meanwhile; there are no further ones now.
        self._finish()

    def cancel(self) -> None:
        """End the stream at once, whatever is on its way."""
        for lane in tuple(self._lanes):
            lane.cancel()

    def _finish(self) -> None:
        for lane in tuple(self._lanes):
            if lane.has_welcome:
                lane.finish()
            else:
                lane.cancel()

    @property
    def is_broken(self) -> bool:
        return self._broken is not None

    # ---------------------------------------------------------------- out

    def _ask(
        self,
        name: StepKey | int,
        message: pb.ClientMessage,
        timeout_s: float,
        payload: memoryview | None = None,
    ) -> Any:
        future: Future[Any] = Future()
        outgoing = self._outgoing(message, payload)
        with self._lock:
            if self._broken is not None:
                raise self._broken.again()
            self._waiting[name] = future
            for lane in self._open_lanes() if isinstance(outgoing, Pieces) else self._lanes[:1]:
                lane.send(outgoing)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            raise StepTimeout(
                f"{self._address} did not answer within {timeout_s:g} s: it may be overloaded or cut off; "
                f"try again, or allow more time ({_deadline_of(name)})"
            ) from None
        finally:
            with self._lock:
                self._waiting.pop(name, None)

    def _outgoing(self, message: pb.ClientMessage, payload: memoryview | None) -> Outgoing:
        """The message as it is, or in pieces where it is large."""
        behind = 0 if payload is None else len(payload)
        size = message.ByteSize() + behind
        if size > self._limits.max_message_bytes:
            raise MessageError(
                f"a message of {size:,} bytes, {self._address} takes {self._limits.max_message_bytes:,}: "
                "use fewer rows, a shorter text, or codec='half'"
            )
        self._traffic.count(_tensor_bytes(message) + behind, size)
        if size <= self._limits.chunk_bytes and payload is None:
            return message
        if size >= LANES_FROM_BYTES:
            self._widen()
        return Pieces(
            pb.ClientMessage,
            next(self._numbers),
            message.SerializeToString(),
            payload or memoryview(b""),
            self._limits.chunk_bytes,
            checksum=self.agreement.checksum,
        )

    def _widen(self) -> None:
        """Open the stream's further lanes, once; with fewer than agreed it goes on just the same."""
        with self._widening:
            if self._is_wide:
                return
            self._is_wide = True
            hello = joining(self._hello, self.agreement.ticket)
            try:
                for _ in range(1, self._limits.lanes):
                    self._open_lane(hello)
            except (SplitLearnError, TimeoutError) as error:
                reason = str(error) or f"no welcome within {self._greet_s:g} s"
                log.warning(
                    "fewer connections for large tensors", lanes=len(self._open_lanes()), reason=reason
                )

    def _open_lane(self, hello: pb.Hello) -> None:
        """Raises what the lane was refused with, or TimeoutError where its welcome is late."""
        with self._lock:
            if self._broken is not None:
                raise self._broken.again()
            # Before it begins: whatever ends the stream meanwhile ends it too. Nothing is sent on it yet.
            self._lanes.append(lane := self._new_lane())
        try:
            lane.greet(hello, self._greet_s)
        except TimeoutError:
            # Not cancelled: the server may know it by now, and what it puts on it is read until it ends.
            lane.finish()
            raise

    def _open_lanes(self) -> list[Lane]:
        return [lane for lane in tuple(self._lanes) if lane.takes_messages]

    def _new_lane(self) -> Lane:
        return Lane(self._open_channel(), self._address, self._take, self._lane_ended)

    # ---------------------------------------------------------------- in

    def _take(self, message: Incoming) -> None:
        if isinstance(message, Piece) or message.WhichOneof("content") == "chunk":
            piece = message if isinstance(message, Piece) else message.chunk
            if (whole := self._assembly.add(piece)) is not None:
                self._take_whole(parse(pb.ServerMessage, whole.message), whole)
        else:
            self._take_whole(message, Whole(b"", None))

    def _take_whole(self, message: pb.ServerMessage, whole: Whole) -> None:
        match message.WhichOneof("content"):
            case "answer":
                behind = 0 if whole.payload is None else whole.payload.numel()
                self._traffic.count(
                    _tensor_bytes(message) + behind, message.ByteSize() + behind, received=True
                )
                answer = (message.answer, whole.payload) if whole.is_intact else CorruptFrame(CORRUPT)
                self._give(key_from_proto(message.answer.key), answer)
            case "forked":
                self._give(message.forked.session, message.forked)
            case "error":
                raise error_from_proto(message.error)
            case other:
                raise MessageError(f"a server's message of kind {other} is not in the protocol")

    def _give(self, name: StepKey | int, value: Any) -> None:
        with self._lock:
            future = self._waiting.pop(name, None)
        # Nobody waits any more where a deadline passed before the answer came.
        if future is None:
            return
        if isinstance(value, SplitLearnError):
            future.set_exception(value)
        else:
            future.set_result(value)

    def _lane_ended(self, lane: Lane, error: SplitLearnError) -> None:
        """What it carried is lost, and nobody knows of which messages: the whole stream ends.

        A lane without a welcome carried nothing that this side sent; the server knows what it put on it.
        Where the server ended a further lane in order it has ended the stream, whose own lane says why.
        """
        if lane is self._lanes[0] or (lane.has_welcome and not lane.ended_in_order):
            self._break(error)
            self.cancel()
        else:
            with self._lock:
                self._lanes.remove(lane)

    def _break(self, error: SplitLearnError) -> None:
        with self._lock:
            self._broken = self._broken or error
            waiting, self._waiting = list(self._waiting.values()), {}
        for future in waiting:
            future.set_exception(error.again())


def _deadline_of(name: StepKey | int) -> str:
    """The settings that say how long an answer to this may take."""
    return "train_s" if isinstance(name, StepKey) and name.run else "decode_s, prefill_s"


def _tensor_bytes(message: pb.ClientMessage | pb.ServerMessage) -> int:
    holder = message.step if isinstance(message, pb.ClientMessage) else message.answer
    return len(holder.activation.data)
