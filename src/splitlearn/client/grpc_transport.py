"""A trunk over gRPC: small steps and large ones on connections of their own."""

from __future__ import annotations

import secrets
import threading

import grpc

from splitlearn.client.grpc_errors import error_of
from splitlearn.client.step_stream import StepStream
from splitlearn.client.transport import Traffic
from splitlearn.config import ClientConfig
from splitlearn.errors import CorruptFrame, StepTimeout, TrunkUnreachable
from splitlearn.vocabulary import Precision
from splitlearn.wire.frames import FrameFormat
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.generated import splitlearn_pb2_grpc as rpc
from splitlearn.wire.handshake import (
    CLIENT_ID_BYTES,
    Agreement,
    ModelIdentity,
    agreement,
    facts_from_proto,
    hello,
)
from splitlearn.wire.messages import AnswerMessage, CloseMessage, ForkMessage, StepMessage, TrunkFacts
from splitlearn.wire.status import error_from_proto
from splitlearn.wire.steps import answer_from_proto, fork_to_proto, step_to_proto

BULK_BYTES = 256 << 10
ASK_AGAIN = 2


def describe(address: str, timeout_s: float) -> TrunkFacts:
    """What the trunk at this address says of itself.

    Raises:
        TrunkUnreachable, NotATrunk: nobody answers there, or somebody else does.
    """
    with _channel(address, ClientConfig()) as channel:
        try:
            reply = rpc.TrunkStub(channel).Describe(pb.DescribeRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_of(error, address) from None
    return facts_from_proto(reply)


class GrpcTransport:
    """Connects at once, so that a wrong address, model or split shows before any weight is read.

    Args:
        address: `host:port`.
        identity: the model and the cut that the client has.
        config: deadlines and limits.
        format: how activations are written down.

    Raises:
        TrunkUnreachable, NotATrunk, ProtocolMismatch, ModelMismatch, SplitMismatch, TrunkDraining.
    """

    def __init__(
        self, address: str, identity: ModelIdentity, config: ClientConfig, format: FrameFormat
    ) -> None:
        self.address = address
        self.traffic = Traffic()
        self._identity = identity
        self._config = config
        self._client = secrets.token_bytes(CLIENT_ID_BYTES)
        self._lock = threading.Lock()
        self._channels: list[grpc.Channel] = []
        self._sessions: set[int] = set()
        self._bulk: StepStream | None = None
        self._small, self.agreement = self._connect()
        self._format = FrameFormat(format.codec, self.agreement.checksum)

    def step(self, message: StepMessage) -> AnswerMessage:
        """The step's answer; a frame that arrived corrupt is asked for again, which runs nothing twice."""
        for attempts_left in reversed(range(ASK_AGAIN + 1)):
            try:
                return self._ask(message)
            except CorruptFrame:
                if not attempts_left:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def fork(self, message: ForkMessage) -> None:
        forked = self._small.fork(fork_to_proto(message), self._config.decode_s)
        if forked.HasField("error"):
            raise error_from_proto(forked.error)
        self._sessions.add(message.into)

    def close_session(self, message: CloseMessage) -> None:
        self._sessions.discard(message.session)
        self._small.tell(
            pb.ClientMessage(close=pb.CloseSession(session=message.session, incarnation=message.incarnation))
        )

    def close(self) -> None:
        """End the connection; the server frees what its sessions hold."""
        for session in list(self._sessions):
            self.close_session(CloseMessage(session))
        for stream in (self._small, self._bulk):
            if stream is not None:
                stream.close()
        for channel in self._channels:
            channel.close()
        self._channels = []

    def _ask(self, message: StepMessage) -> AnswerMessage:
        proto = step_to_proto(message, self._format)
        stream = self._small if len(proto.activation.data) < BULK_BYTES else self._bulk_stream()
        answer = stream.step(message.key, proto, message.deadline_s)
        shape = (message.rows, message.tokens, message.activation_BTD.shape[2])
        decoded = answer_from_proto(answer, shape, checksum=self.agreement.checksum)
        if decoded.error is not None:
            raise decoded.error
        if message.open is not None:
            self._sessions.add(message.key.session)
        return decoded

    def _bulk_stream(self) -> StepStream:
        with self._lock:
            if self._bulk is None:
                self._bulk, _ = self._connect()
            return self._bulk

    def _connect(self) -> tuple[StepStream, Agreement]:
        config = self._config
        channel = _channel(self.address, config)
        self._channels.append(channel)
        stream = StepStream(channel, self.address, config.limits, self.traffic)
        greeting = hello(self._identity, self._client, Precision(), checksum=config.checksum)
        try:
            agreed = agreement(stream.greet(greeting, config.connect_s))
        except StepTimeout:
            stream.cancel()
            raise TrunkUnreachable(
                f"{self.address} accepts connections but says nothing within {config.connect_s:g} s: "
                "is it a SplitLearn server? Check host and port"
            ) from None
        except BaseException:
            channel.close()
            raise
        stream.keep_to(agreed)
        return stream, agreed


def _channel(address: str, config: ClientConfig) -> grpc.Channel:
    return grpc.insecure_channel(
        address,
        options=[
            # The server cuts its messages into pieces of its own choice.
            ("grpc.max_receive_message_length", config.limits.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # One TCP connection a channel: bulk transfers do not hold up decode steps.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )
