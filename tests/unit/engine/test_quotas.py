"""A client that has had its quota is refused or waits, told that it is its own; others notice nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitlearn.config import BatchingConfig, QuotaConfig, SessionConfig
from splitlearn.engine.engine import Engine
from splitlearn.errors import MessageError, ResourceExhausted, SplitLearnError, StepTimeout
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.testing.tiny import tiny_config
from splitlearn.vocabulary import LoraSettings, OptimizerSettings, Phase, RunSettings, StepKey
from splitlearn.wire.messages import (
    AdapterMessage,
    AnswerMessage,
    CloseMessage,
    ForkMessage,
    OpenRun,
    OpenSession,
    OptimizerStep,
    RunStepMessage,
    StepMessage,
)
from splitlearn.wire.status import error_from_proto, error_to_proto

WAIT_S, HIDDEN = 20, 32
ME, YOU = b"me", b"you"
LORA = LoraSettings(r=2, alpha=4.0, target_modules=("q_proj",))
WEIGHT_BYTES = 2 * 2 * (2 * HIDDEN) * 4
"""Two layers, A and B, rank 2, float32."""


@pytest.fixture(scope="module")
def trunk() -> TrunkSegment:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    return TrunkSegment.of_whole(whole, SplitPlan(6, 2, 2))


@contextmanager
def served(trunk: TrunkSegment, **quotas: Any) -> Iterator[Engine]:
    sessions = SessionConfig(kv_budget_bytes=1 << 20, session_tokens=64)
    engine = Engine(trunk, BatchingConfig(wait_ms=0), sessions, quotas=QuotaConfig(**quotas))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def held(engine: Engine, client: bytes = ME) -> tuple[int, int]:
    """Sessions and bytes that are counted as this client's."""
    account = engine._runs._accounts.of(client)
    return account.sessions, account.bytes


def do(engine: Engine, message: StepMessage | RunStepMessage, client: bytes = ME) -> AnswerMessage:
    answer = engine.submit(client, message).result(WAIT_S)
    if answer.error is not None:
        raise answer.error
    return answer


def step(number: int = 1, tokens: int = 2, rows: int = 1, session: int = 1, **how: Any) -> StepMessage:
    opening = OpenSession() if number == 1 else None
    key = StepKey(session=session, step=number)
    return StepMessage(key, torch.zeros(rows, tokens, HIDDEN), **({"open": opening} | how))


def train(run: Any, phase: Phase, tokens: int = 4, **how: Any) -> RunStepMessage:
    key = StepKey(run=run.number, incarnation=run.incarnation, step=1, phase=phase)
    tensor = torch.ones(1, tokens, HIDDEN) if phase in (Phase.FORWARD, Phase.BACKWARD) else None
    return RunStepMessage(key, tensor, **how)


def open_run(engine: Engine, client: bytes = ME, name: str = "run", **settings: Any) -> Any:
    asked = OpenRun(name, RunSettings(lora=LORA, **settings))
    return engine.runs.open(client, asked).result(WAIT_S)


def test_sessions_over_the_quota_are_refused_until_one_is_closed(trunk):
    with served(trunk, max_sessions=2) as engine:
        for session in (1, 2):
            do(engine, step(session=session))
        with pytest.raises(ResourceExhausted, match="your own quota") as refused:
            do(engine, step(session=3))
        assert refused.value.facts == {"wanted_sessions": 1, "held_sessions": 2, "limit_sessions": 2}
        with pytest.raises(ResourceExhausted, match="your own quota"):
            engine.fork(ME, ForkMessage(1, 9, at_step=1)).result(WAIT_S)
        do(engine, step(session=3), YOU)
        do(engine, step(2, 1, session=2))
        engine.close(ME, CloseMessage(1)).result(WAIT_S)
        do(engine, step(session=3))


def test_a_session_that_could_not_be_had_is_not_counted(trunk):
    with served(trunk, max_bytes=1 << 30) as engine:
        with pytest.raises(ResourceExhausted):
            do(engine, step(rows=1000))
        assert held(engine) == (0, 0)


def test_slots_count_as_long_as_they_are_held(trunk):
    with served(trunk) as engine:
        slot = engine.kv.slot_bytes
        do(engine, step(rows=2))
        assert held(engine) == (1, 2 * slot)
        do(engine, step(2, 1, rows=4, select_rows=(0, 0, 1, 1)))
        assert held(engine) == (1, 4 * slot)
        engine.fork(ME, ForkMessage(1, 2, at_step=2)).result(WAIT_S)
        assert held(engine) == (2, 8 * slot)
        do(engine, step(1, 1, rows=1, session=2, open=None, select_rows=(3,)))
        assert held(engine) == (2, 5 * slot)
        engine.close(ME, CloseMessage(1)).result(WAIT_S)
        assert held(engine) == (1, slot)
        engine.close(ME, CloseMessage(2)).result(WAIT_S)
        assert held(engine) == (0, 0)
        assert engine.kv.free_bytes == engine.kv.total_bytes


def test_rows_over_the_quota_are_refused_and_the_session_goes_on(trunk):
    with served(trunk) as engine:
        slot = engine.kv.slot_bytes
    with served(trunk, max_bytes=3 * slot) as engine:
        do(engine, step(rows=2))
        with pytest.raises(ResourceExhausted, match="your own quota") as refused:
            do(engine, step(2, 1, rows=4, select_rows=(0, 0, 1, 1)))
        assert refused.value.facts == {
            "wanted_bytes": 2 * slot,
            "held_bytes": 2 * slot,
            "limit_bytes": 3 * slot,
        }
        do(engine, step(2, 1, rows=2))
        do(engine, step(rows=3), YOU)
        assert held(engine) == (1, 2 * slot)


@pytest.mark.parametrize(("name", "times"), [("adamw_torch", 2), ("sgd", 0), ("adamw_torch_fused", 2)])
def test_a_run_counts_with_its_weights_gradients_and_optimizer(trunk, name, times):
    with served(trunk) as engine:
        run = open_run(engine, optimizer=OptimizerSettings(name))
        assert held(engine) == (0, (2 + times) * WEIGHT_BYTES)
        table = engine._runs.named("run")
        for phase in (Phase.FORWARD, Phase.BACKWARD):
            do(engine, train(run, phase))
        do(engine, train(run, Phase.OPTIMIZER_STEP, optimizer=OptimizerStep(1.0, 0.1)))
        state = [
            value.nbytes for each in table.optimizer.state.values() for value in each.values() if value.ndim
        ]
        assert sum(state) == times * WEIGHT_BYTES
        assert held(engine) == (0, (2 + times) * WEIGHT_BYTES)
        engine.runs.close("run").result(WAIT_S)
        assert held(engine) == (0, 0)


def test_runs_and_adapters_over_the_quota_leave_nothing_in_the_trunk(trunk):
    weights = {
        f"model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.ones(*shape)
        for layer in (2, 3)
        for side, shape in (("A", (2, HIDDEN)), ("B", (HIDDEN, 2)))
    }
    adapter = AdapterMessage("adapter", 1, LORA, weights)
    with served(trunk, max_bytes=5 * WEIGHT_BYTES) as engine:
        before = {name for name, _ in trunk.named_parameters()}
        engine.runs.load_adapter(ME, adapter).result(WAIT_S)
        open_run(engine)
        assert held(engine) == (0, 5 * WEIGHT_BYTES)
        for ask in (
            lambda: open_run(engine, name="other"),
            lambda: engine.runs.load_adapter(ME, AdapterMessage("two", 1, LORA, weights)).result(WAIT_S),
        ):
            with pytest.raises(ResourceExhausted, match="your own quota") as refused:
                ask()
            assert refused.value.facts["held_bytes"] == 5 * WEIGHT_BYTES
        with pytest.raises(MessageError, match="open already"):
            open_run(engine, YOU)
        open_run(engine, YOU, "yours")
        engine.runs.unload_adapter(ME, "adapter").result(WAIT_S)
        for name in ("run", "yours"):
            engine.runs.close(name).result(WAIT_S)
        assert {name for name, _ in trunk.named_parameters()} == before
        assert held(engine) == held(engine, YOU) == (0, 0)


def test_who_takes_a_run_over_has_it_counted_or_does_not_get_it(trunk):
    with served(trunk, max_bytes=5 * WEIGHT_BYTES) as engine:
        run = open_run(engine)
        open_run(engine, YOU, "yours")
        with pytest.raises(ResourceExhausted, match="your own quota"):
            engine.runs.join(YOU, "run").result(WAIT_S)
        do(engine, train(run, Phase.GRADIENT_NORMS))
        engine.runs.close("yours").result(WAIT_S)
        engine.runs.join(YOU, "run").result(WAIT_S)
        assert held(engine) == (0, 0)
        assert held(engine, YOU) == (0, 4 * WEIGHT_BYTES)


def test_what_a_forward_keeps_counts_until_its_gradient_comes(trunk):
    with served(trunk) as engine:
        run = open_run(engine)
        opened = held(engine)[1]
        do(engine, train(run, Phase.FORWARD))
        kept = held(engine)[1] - opened
        assert kept == engine.tape.bytes > 4 * HIDDEN * 4
        do(engine, train(run, Phase.BACKWARD))
        assert held(engine)[1] == opened
        engine.runs.close("run").result(WAIT_S)
    with served(trunk, max_bytes=opened + kept - 1) as engine:
        run = open_run(engine)
        with pytest.raises(ResourceExhausted, match=r"until its gradient comes.*your own quota"):
            do(engine, train(run, Phase.FORWARD))
        assert held(engine) == (0, opened)
        do(engine, train(run, Phase.FORWARD, tokens=2))
        engine.runs.close("run").result(WAIT_S)
        assert held(engine) == (0, 0)


# ---------------------------------------------------------------- tokens a second


def test_who_has_had_its_tokens_waits_and_nobody_waits_for_it(trunk):
    with served(trunk, max_tokens_per_s=5.0, burst_tokens=1) as engine:
        do(engine, step(tokens=2, session=2), YOU)
        do(engine, step(tokens=9))
        late = engine.submit(ME, step(2, 1))
        assert engine._queue.ask(lambda: len(engine._pacing)).result(WAIT_S) == 1
        assert engine._queue.ask(lambda: len(engine._ready)).result(WAIT_S) == 0, "no batch has to leave room"
        session = next(iter(engine._sessions._sessions.values()))
        assert engine._pacing.is_broke(ME, 0.0)
        assert not late.done()
        assert session.id[0] == YOU
        assert late.result(WAIT_S).error is None
        assert late.result().timings.queued_us > 100_000


def test_a_step_that_would_wait_too_long_is_refused_and_can_be_asked_again(trunk):
    with served(trunk, max_tokens_per_s=20.0, burst_tokens=1) as engine:
        do(engine, step(tokens=11))
        with pytest.raises(ResourceExhausted, match="your own quota") as refused:
            do(engine, step(2, 1, deadline_s=0.1))
        assert 100 < refused.value.facts["retry_after_ms"] <= 500
        assert error_from_proto(error_to_proto(refused.value)).facts == refused.value.facts
        do(engine, step(2, 1, deadline_s=5.0))


def test_a_session_that_was_refused_its_first_step_is_not_open(trunk):
    with served(trunk, max_tokens_per_s=1.0, burst_tokens=1) as engine:
        do(engine, step(tokens=60))
        with pytest.raises(ResourceExhausted, match="your own quota"):
            do(engine, step(session=2, deadline_s=1.0))
        assert held(engine) == (1, engine.kv.slot_bytes)
        assert torch.equal(do(engine, step(tokens=60)).activation_BTD, do(engine, step()).activation_BTD), (
            "a kept answer costs nothing"
        )


def test_forward_and_backward_of_a_run_count_too(trunk):
    with served(trunk, max_tokens_per_s=20.0, burst_tokens=1) as engine:
        run = open_run(engine)
        do(engine, train(run, Phase.FORWARD, tokens=11))
        assert do(engine, train(run, Phase.BACKWARD, tokens=11)).timings.queued_us > 200_000
        with pytest.raises(ResourceExhausted):
            do(engine, train(run, Phase.GRADIENT_NORMS, deadline_s=0.1))
        engine.runs.close("run").result(WAIT_S)


def test_whoever_stops_waiting_is_not_run_and_a_server_that_stops_answers_all(trunk):
    with served(trunk, max_tokens_per_s=1.0, burst_tokens=1) as engine:
        do(engine, step(tokens=60))
        waiting = engine.submit(ME, step(2, 1))
        given_up = engine.submit(ME, step(session=2))
        given_up.cancel()
        do(engine, step(session=5), YOU)
        assert engine._queue.ask(lambda: len(engine._pacing)).result(WAIT_S) == 1
        assert held(engine) == (1, engine.kv.slot_bytes), "what it was to open is not"
    error = waiting.result(WAIT_S).error
    assert isinstance(error, SplitLearnError)
    assert not isinstance(error, StepTimeout)


def test_an_adapter_that_nobody_uses_is_unloaded_and_one_that_a_session_holds_is_not(trunk):
    """Its client may be gone for good, and nobody else could unload it."""
    weights = {
        f"model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.ones(*shape)
        for layer in (2, 3)
        for side, shape in (("A", (2, HIDDEN)), ("B", (HIDDEN, 2)))
    }
    with served(trunk) as engine:
        versions = [
            engine.runs.load_adapter(ME, AdapterMessage(name, 1, LORA, weights)).result(WAIT_S)
            for name in ("idle", "held")
        ]
        adapters = engine._adapters
        adapters._lease_s = 10.0
        now = adapters.find(ME, "idle").used_at
        expire = [
            engine._queue.ask(lambda at=at: adapters.expire(at, {versions[1]})).result(WAIT_S)
            for at in (now + 5.0, now + 15.0)
        ]
        assert expire == [[], ["idle"]]
        assert held(engine) == (0, WEIGHT_BYTES)
        engine.runs.unload_adapter(ME, "held").result(WAIT_S)
