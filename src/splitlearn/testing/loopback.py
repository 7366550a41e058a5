"""A trunk in this process, reached without a network: the engine is the real one, nothing is encoded."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from splitlearn.client.split_model import connect
from splitlearn.client.transport import Traffic
from splitlearn.config import (
    AttentionName,
    BatchingConfig,
    ClientConfig,
    RunConfig,
    SessionConfig,
    WireLimits,
)
from splitlearn.engine.engine import Engine
from splitlearn.errors import NotServed, StepTimeout
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.plan import SplitPlan
from splitlearn.model.weights import load_trunk
from splitlearn.vocabulary import StepKey
from splitlearn.wire.codecs import CODECS
from splitlearn.wire.handshake import CLIENT_ID_BYTES, Agreement, ModelIdentity
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
from splitlearn.wire.sessions import Collected, MovedSession

FORK_S = 60.0
SMALL = SessionConfig(kv_budget_bytes=1 << 20, session_tokens=96)
Result = TypeVar("Result")


class LoopbackTransport:
    """One client of an engine that someone else starts and stops."""

    def __init__(self, engine: Engine, sessions: SessionConfig, limits: WireLimits = WireLimits()) -> None:  # noqa: B008
        self.traffic = Traffic()
        self.agreement = Agreement(
            codecs=frozenset(codec.value for codec in CODECS),
            checksum=False,
            max_message_bytes=limits.max_message_bytes,
            chunk_bytes=limits.chunk_bytes,
            max_positions=engine.trunk.max_positions or 0,
            attention=engine.trunk.attention,
        )
        self._engine = engine
        self._client = secrets.token_bytes(CLIENT_ID_BYTES)

    def step(self, message: StepMessage) -> AnswerMessage:
        sent = replace(message, activation_BTD=self._carry(message.activation_BTD))
        answer = _within(message.deadline_s or None, self._engine.submit(self._client, sent))
        if answer.error is not None:
            raise answer.error
        assert answer.activation_BTD is not None
        return replace(answer, activation_BTD=self._carry(answer.activation_BTD))

    def run_step(self, message: RunStepMessage) -> AnswerMessage:
        tensor_BTD = None if message.tensor_BTD is None else self._carry(message.tensor_BTD)
        sent = replace(message, tensor_BTD=tensor_BTD, ends=self._carry_all(message.ends))
        answer = _within(message.deadline_s or None, self._engine.submit(self._client, sent))
        if answer.error is not None:
            raise answer.error
        received = answer.activation_BTD
        carried = None if received is None else self._carry(received)
        return replace(answer, activation_BTD=carried, ends=self._carry_all(answer.ends))

    def open_run(self, asked: OpenRun) -> RunFacts:
        return _within(FORK_S, self._engine.runs.open(self._client, asked))

    def join_run(self, name: str, member: str = "") -> RunFacts:
        return _within(FORK_S, self._engine.runs.join(self._client, name, member))

    def renew_member(self, name: str, incarnation: int) -> None:
        _within(FORK_S, self._engine.runs.renew(self._client, name, incarnation))

    def leave_run(self, name: str) -> None:
        _within(FORK_S, self._engine.runs.leave(self._client, name))

    def run_facts(self, name: str) -> RunFacts:
        return _within(FORK_S, self._engine.runs.facts_for(self._client, name))

    def save_run(self, name: str, at: StepKey, acknowledged: Sequence[int]) -> RunFacts:
        raise NotServed("an engine alone has no disk: use a TrunkServer")

    def restore_run(self, name: str, step: int, digest: int = 0) -> RunFacts:
        raise NotServed("an engine alone has no disk: use a TrunkServer")

    def close_run(self, name: str) -> None:
        _within(FORK_S, self._engine.runs.close(name))

    def delete_run(self, name: str) -> int:
        _within(FORK_S, self._engine.runs.close(name))
        return 0

    def download_adapter(self, name: str) -> AdapterMessage:
        return _within(FORK_S, self._engine.runs.adapter(self._client, name))

    def give_ends(self, name: str, at: StepKey, given: GivenEnds) -> None:
        raise NotServed("an engine alone averages no ends: use a TrunkServer")

    def take_average(self, name: str, at: StepKey, number: int, since: int) -> AveragedEnds:
        raise NotServed("an engine alone averages no ends: use a TrunkServer")

    def load_adapter(self, adapter: AdapterMessage) -> None:
        _within(FORK_S, self._engine.runs.load_adapter(self._client, adapter))

    def unload_adapter(self, name: str) -> None:
        _within(FORK_S, self._engine.runs.unload_adapter(self._client, name))

    def fork(self, message: ForkMessage) -> None:
        _within(FORK_S, self._engine.fork(self._client, message))

    def export_session(self, session: int, layers: int) -> MovedSession:
        moves, id = self._engine.moves, (self._client, session)
        head = _within(FORK_S, moves.head(id))
        collected = Collected(head, layers)
        for box in moves.boxes(head, self.agreement.chunk_bytes):
            collected.add(_within(FORK_S, moves.read(id, head, box)))
        plan = self._engine.trunk.plan
        # An engine alone knows its cut, and not which model it has the trunk of.
        return collected.joined(ModelIdentity(0, 0, len(plan.bottom), len(plan.trunk), len(plan.top)))

    def import_session(self, session: int, moved: MovedSession) -> None:
        moves, id = self._engine.moves, (self._client, session)
        _within(FORK_S, moves.begin(id, moved.head))
        for part in moved.parts(self.agreement.chunk_bytes):
            _within(FORK_S, moves.write(id, part))
        _within(FORK_S, moves.finish(id))

    def close_session(self, message: CloseMessage) -> None:
        self._engine.close(self._client, message)

    def abandon(self) -> None:
        """Nothing is open but the engine, which is not ours."""

    def close(self) -> None:
        """Nothing is open but the engine, which is not ours."""

    def _carry_all(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._carry(tensor) for name, tensor in tensors.items()}

    def _carry(self, tensor: Tensor) -> Tensor:
        """A copy, as a wire makes one: neither side can write into the other's memory."""
        self.traffic.count(tensor.nbytes, tensor.nbytes)
        return tensor.detach().cpu().clone()


@contextmanager
def split_over_loopback(
    folder: str | Path,
    plan: SplitPlan | None = None,
    sessions: SessionConfig = SMALL,
    runs: RunConfig | None = None,
    batching: BatchingConfig = BatchingConfig(),  # noqa: B008
    attention: AttentionName = "auto",
    **how: Any,
) -> Iterator[PreTrainedModel]:
    """The model in this folder, split 2/n/2 or as planned; `how` is `dtype` and the like, for both sides.

    `attention` is the trunk's.
    """
    checkpoint = Checkpoint.open(folder)
    plan = plan or SplitPlan.for_config(checkpoint.config)
    engine = Engine(load_trunk(checkpoint, plan, attention=attention, **how), batching, sessions, runs)
    engine.start()
    try:
        yield connect(checkpoint, plan, LoopbackTransport(engine, sessions), ClientConfig(), **how)
    finally:
        engine.stop()


def _within(timeout_s: float | None, future: Future[Result]) -> Result:
    try:
        return future.result(timeout_s)
    except TimeoutError:
        raise StepTimeout(f"the engine did not answer within {timeout_s:g} s") from None
