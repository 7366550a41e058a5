"""A trunk over gRPC: small steps and large ones on connections of their own, made anew where one broke."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from splitlearn.client.calls import calling, open_channel
from splitlearn.client.step_stream import StepStream
from splitlearn.client.transport import Traffic
from splitlearn.config import ClientConfig
from splitlearn.errors import CorruptFrame, SettingError, StepTimeout, TrunkUnreachable
from splitlearn.vocabulary import Phase, Precision, StepKey
from splitlearn.wire.adapters import adapter_from_parts, adapter_to_parts
from splitlearn.wire.averages import average_from_parts, given_to_parts
from splitlearn.wire.frames import FrameFormat
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.handshake import (
    CLIENT_ID_BYTES,
    Agreement,
    ModelIdentity,
    agreement,
    hello,
)
from splitlearn.wire.messages import (
    AdapterMessage,
    AnswerMessage,
    AveragedEnds,
    CloseMessage,
    ForkMessage,
    GivenEnds,
    OpenRun,
    RunFacts,
    RunStepMessage,
    StepMessage,
)
from splitlearn.wire.runs import facts_from_proto as run_facts_from_proto
from splitlearn.wire.runs import open_run_to_proto
from splitlearn.wire.sessions import MovedSession, session_from_parts, session_to_parts
from splitlearn.wire.status import error_from_proto
from splitlearn.wire.steps import answer_from_proto, fork_to_proto, run_step_to_proto, step_to_proto

SMALL, BULK = "small", "bulk"
ASK_AGAIN = 2
Answered = TypeVar("Answered")


class GrpcTransport:
    """Connects at once, so that a wrong address, model or split shows before any weight is read.

    A connection that broke is made anew at the next call, under the same client id: sessions that the
    server still holds are found again.

    Args:
        address: `host:port`.
        identity: the model and the cut that the client has.
        config: deadlines and limits.
        format: how activations are written down.
        client: the id by which the server knows this client, 16 secret bytes; by default drawn now.

    Raises:
        TrunkUnreachable, NotATrunk, ProtocolMismatch, ModelMismatch, SplitMismatch, TrunkDraining,
        SettingError: there is no such trunk, it is not the one that is meant, or it lacks the codec.
    """

    def __init__(
        self,
        address: str,
        identity: ModelIdentity,
        config: ClientConfig,
        format: FrameFormat,
        client: bytes | None = None,
    ) -> None:
        self.address = address
        self.traffic = Traffic()
        self._identity = identity
        self._config = config
        self._codec = format.codec
        self._client = client or secrets.token_bytes(CLIENT_ID_BYTES)
        self._lock = threading.Lock()
        self._streams: dict[str, StepStream] = {}
        self._sessions: set[int] = set()
        self._is_closed = False
        self.agreement = self._stream(SMALL).agreement

    def step(self, message: StepMessage) -> AnswerMessage:
        """The step's answer; one whose frame arrived corrupt is asked for again.

        A session's step is not run again for that: the server kept its answer.
        """
        decoded = _unless_corrupt(lambda: self._ask(message))
        if message.open is not None:
            self._sessions.add(message.key.session)
        return decoded

    def run_step(self, message: RunStepMessage) -> AnswerMessage:
        """A run's answer, asked for again where its frame arrived corrupt: the server does a step once."""
        return _unless_corrupt(lambda: self._ask_run(message))

    def open_run(self, asked: OpenRun) -> RunFacts:
        request = open_run_to_proto(asked, self._client)
        return run_facts_from_proto(self._call("OpenRun", request))

    def join_run(self, name: str, member: str = "") -> RunFacts:
        request = pb.JoinRunRequest(name=name, client=self._client, member=member)
        return run_facts_from_proto(self._call("JoinRun", request))

    def renew_member(self, name: str, incarnation: int) -> None:
        self._call("JoinRun", pb.JoinRunRequest(name=name, client=self._client, incarnation=incarnation))

    def leave_run(self, name: str) -> None:
        self._call("LeaveRun", pb.RunRequest(name=name, client=self._client))

    def run_facts(self, name: str) -> RunFacts:
        request = pb.RunRequest(name=name, client=self._client)
        return run_facts_from_proto(self._call("GetRun", request))

    def save_run(self, name: str, at: StepKey, acknowledged: Sequence[int]) -> RunFacts:
        request = pb.SaveRunRequest(
            name=name,
            client=self._client,
            run=at.run,
            incarnation=at.incarnation,
            step=at.step,
            acknowledged_step=max(acknowledged, default=0),
            kept_steps=acknowledged,
        )
        return run_facts_from_proto(self._call("SaveRun", request))

    def restore_run(self, name: str, step: int, digest: int = 0) -> RunFacts:
        request = pb.RestoreRunRequest(name=name, client=self._client, step=step, digest=digest)
        return run_facts_from_proto(self._call("RestoreRun", request))

    def close_run(self, name: str) -> None:
        self._call("CloseRun", pb.RunRequest(name=name, client=self._client))

    def delete_run(self, name: str) -> int:
        return int(self._call("DeleteRun", pb.RunRequest(name=name, client=self._client)).freed_bytes)

    def download_adapter(self, name: str) -> AdapterMessage:
        request = pb.AdapterRequest(name=name, client=self._client)
        with calling(self.address, self._config) as trunk:
            parts = trunk.DownloadAdapter(request, timeout=self._config.train_s)
            return adapter_from_parts(parts, self._config.limits.max_message_bytes)

    def give_ends(self, name: str, at: StepKey, given: GivenEnds) -> None:
        parts = given_to_parts(name, at, self._client, given, self._config.limits.chunk_bytes)
        self._call("GiveEnds", parts)

    def take_average(self, name: str, at: StepKey, number: int, since: int) -> AveragedEnds:
        request = pb.AverageRequest(
            name=name,
            client=self._client,
            run=at.run,
            incarnation=at.incarnation,
            number=number,
            since=since,
        )
        with calling(self.address, self._config) as trunk:
            parts = trunk.TakeAverage(request, timeout=self._config.train_s)
            return average_from_parts(parts, self._config.limits.max_message_bytes)

    def load_adapter(self, adapter: AdapterMessage) -> None:
        self._call("LoadAdapter", adapter_to_parts(adapter, self._client, self._config.limits.chunk_bytes))

    def unload_adapter(self, name: str) -> None:
        self._call("UnloadAdapter", pb.AdapterRequest(name=name, client=self._client))

    def fork(self, message: ForkMessage) -> None:
        forked = self._stream(SMALL).fork(fork_to_proto(message), self._config.decode_s)
        if forked.HasField("error"):
            raise error_from_proto(forked.error)
        self._sessions.add(message.into)

    def export_session(self, session: int, layers: int) -> MovedSession:
        request = pb.ExportSessionRequest(session=session, client=self._client)
        with calling(self.address, self._config) as trunk:
            parts = trunk.ExportSession(request, timeout=self._config.train_s)
            return session_from_parts(parts, layers, self._config.limits)

    def import_session(self, session: int, moved: MovedSession) -> None:
        parts = session_to_parts(moved, session, self._client, self.agreement.chunk_bytes)
        self._call("ImportSession", parts)
        self._sessions.add(session)

    def close_session(self, message: CloseMessage) -> None:
        """On every connection, lanes too, so that it comes after the session's opening wherever that went."""
        self._sessions.discard(message.session)
        close = pb.CloseSession(session=message.session, incarnation=message.incarnation)
        for stream in tuple(self._streams.values()):
            stream.tell(pb.ClientMessage(close=close))

    def close(self) -> None:
        self._end(wait=True)

    def abandon(self) -> None:
        self._end(wait=False)

    def _end(self, *, wait: bool) -> None:
        """The server frees what this client's sessions hold."""
        self._is_closed = True
        for session in tuple(self._sessions):
            self.close_session(CloseMessage(session))
        for stream in tuple(self._streams.values()):
            stream.close(wait=wait)

    def _ask(self, message: StepMessage) -> AnswerMessage:
        format = self._format.apart_if_large()
        proto = step_to_proto(message, format)
        return self._exchange(proto, format, message.key, message.deadline_s, message.activation_BTD)

    def _ask_run(self, message: RunStepMessage) -> AnswerMessage:
        format = self._format.apart_if_large()
        proto = run_step_to_proto(message, format)
        due = message.tensor_BTD
        if message.key.phase is Phase.BACKWARD and not message.want_input_gradient:
            due = None
        return self._exchange(proto, format, message.key, message.deadline_s, due)

    def _exchange(
        self,
        proto: pb.Step,
        format: FrameFormat,
        key: StepKey,
        deadline_s: float,
        like_BTD: Tensor | None,
    ) -> AnswerMessage:
        """The answer, whose tensor must have the shape of `like_BTD`; raises the server's error."""
        behind = format.apart[0] if format.apart else None
        answer, payload = self._stream(SMALL if behind is None else BULK).step(key, proto, deadline_s, behind)
        shape = None
        if like_BTD is not None:
            rows, tokens, hidden_size = like_BTD.shape
            shape = (rows, tokens, hidden_size)
        decoded = answer_from_proto(answer, shape, checksum=self.agreement.checksum, payload=payload)
        if decoded.error is not None:
            raise decoded.error
        return decoded

    def _call(self, name: str, request: Any) -> Any:
        """A unary call, on a connection of its own: they are rare."""
        with calling(self.address, self._config) as trunk:
            return getattr(trunk, name)(request, timeout=self._config.train_s)

    @property
    def _format(self) -> FrameFormat:
        return FrameFormat(self._codec, self.agreement.checksum)

    def _stream(self, name: str) -> StepStream:
        """The connection of this name, made at its first use and again where it broke."""
        with self._lock:
            if self._is_closed:
                raise TrunkUnreachable(
                    f"the connection to {self.address} was closed here: load the model again"
                )
            stream = self._streams.get(name)
            if stream is None or stream.is_broken:
                stream = self._streams[name] = self._connect()
            return stream

    def _connect(self) -> StepStream:
        config = self._config
        stream = StepStream(
            lambda: open_channel(self.address, config), self.address, config.limits, self.traffic
        )
        try:
            stream.keep_to(self._greet(stream))
        except BaseException:
            stream.cancel()
            raise
        return stream

    def _greet(self, stream: StepStream) -> Agreement:
        config = self._config
        greeting = hello(self._identity, self._client, Precision(), checksum=config.checksum)
        try:
            agreed = agreement(stream.greet(greeting, config.connect_s))
        except StepTimeout:
            raise TrunkUnreachable(
                f"{self.address} accepts connections but says nothing within {config.connect_s:g} s: "
                "is it a SplitLearn server? Check host and port"
            ) from None
        if self._codec.value not in agreed.codecs:
            raise SettingError(f"{self.address} does not know the codec {self._codec.name}: leave codec out")
        return agreed


def _unless_corrupt(ask: Callable[[], Answered]) -> Answered:
    for attempts_left in reversed(range(ASK_AGAIN + 1)):
        try:
            return ask()
        except CorruptFrame:
            if not attempts_left:
                raise
    raise AssertionError("the last attempt returns or raises")
