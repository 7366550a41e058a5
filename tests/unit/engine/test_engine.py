"""The engine does each step once, batches what may be, and keeps one client's fault from the others."""

import threading
from concurrent.futures import Future

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitlearn.config import BatchingConfig, SessionConfig
from splitlearn.engine.engine import Engine
from splitlearn.errors import (
    MessageError,
    RunLost,
    SessionLost,
    SettingError,
    StepOutOfOrder,
    StepTimeout,
    TrunkDraining,
    TrunkFailed,
)
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.testing.tiny import tiny_config
from splitlearn.vocabulary import Phase, Precision, StepKey
from splitlearn.wire.messages import (
    AnswerMessage,
    CloseMessage,
    ForkMessage,
    OpenSession,
    RunStepMessage,
    StepMessage,
)

WAIT_S = 20
ME, YOU = b"me", b"you"
HIDDEN = 32


@pytest.fixture(scope="module")
def trunk() -> TrunkSegment:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    return TrunkSegment.of_whole(whole, SplitPlan(6, 2, 2))


@pytest.fixture
def engine(trunk):
    made = Engine(trunk, BatchingConfig(), SessionConfig(kv_budget_bytes=1 << 20, session_tokens=64))
    yield made
    made.stop()


def tokens(count: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def step(number: int, activation: torch.Tensor, session: int = 1, **fields) -> StepMessage:
    opening = OpenSession() if number == 1 else None
    return StepMessage(StepKey(session=session, step=number), activation, **({"open": opening} | fields))


def result(future: Future[AnswerMessage]) -> torch.Tensor:
    answer = future.result(WAIT_S)
    if answer.error is not None:
        raise answer.error
    return answer.activation_BTD


def alone(trunk: TrunkSegment, activation: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return trunk(activation, position_ids=torch.arange(activation.shape[1])[None])


def test_a_session_in_steps_gives_what_one_forward_gives(engine, trunk):
    engine.start()
    text = tokens(9)
    parts = [result(engine.submit(ME, step(n + 1, text[:, 3 * n : 3 * n + 3]))) for n in range(3)]
    torch.testing.assert_close(torch.cat(parts, 1), alone(trunk, text), atol=1e-6, rtol=1e-5)


def test_sessions_of_different_length_run_as_one_batch_and_each_gets_its_own(engine, trunk):
    texts = {1: tokens(6, seed=1), 2: tokens(12, seed=2), 3: tokens(9, seed=3)}
    expected = {session: alone(trunk, text)[:, -1:] for session, text in texts.items()}
    for session, text in texts.items():
        engine.submit(ME, step(1, text[:, :-1], session))
    engine.start()
    engine.submit(ME, step(1, tokens(1), 9)).result(WAIT_S)
    ran = count_runs(engine)
    hold = engine._queue.ask(lambda: [queue_up(engine, texts, futures)])
    futures: dict = {}
    hold.result(WAIT_S)
    for session in texts:
        torch.testing.assert_close(result(futures[session]), expected[session], atol=1e-6, rtol=1e-5)
    assert [plan.ragged for plan in ran] == [True]
    assert len(ran[0].steps) == 3


def queue_up(engine, texts, futures) -> None:
    """On the engine's thread, so that nothing runs before all of them wait."""
    for session, text in texts.items():
        futures[session] = engine.submit(ME, step(2, text[:, -1:], session))


def test_a_step_that_is_asked_twice_runs_once_and_answers_both(engine):
    message = step(1, tokens(4))
    first, second = engine.submit(ME, message), engine.submit(ME, message)
    engine.start()
    assert torch.equal(result(first), result(second))
    again = engine.submit(ME, message)
    assert torch.equal(result(again), result(first))
    third = result(engine.submit(ME, step(2, tokens(1))))
    assert third.shape == (1, 1, HIDDEN)
    with pytest.raises(StepOutOfOrder):
        result(engine.submit(ME, step(9, tokens(1))))


def test_another_step_of_a_session_that_runs_is_out_of_order(engine):
    first, second = engine.submit(ME, step(1, tokens(4))), engine.submit(ME, step(2, tokens(1)))
    engine.start()
    result(first)
    with pytest.raises(StepOutOfOrder, match="while step 1"):
        result(second)


def test_values_that_are_no_numbers_stay_with_the_client_that_sent_them(engine, trunk):
    sick, well = torch.full((1, 20, HIDDEN), float("nan")), tokens(5)
    engine.start()
    result(engine.submit(YOU, step(1, sick, 1)))
    result(engine.submit(ME, step(1, well[:, :-1], 1)))
    futures: dict = {}

    def both() -> None:
        futures["sick"] = engine.submit(YOU, step(2, sick[:, :1], 1))
        futures["well"] = engine.submit(ME, step(2, well[:, -1:], 1))

    engine._queue.ask(both).result(WAIT_S)
    assert result(futures["sick"]).isnan().all()
    torch.testing.assert_close(result(futures["well"]), alone(trunk, well)[:, -1:], atol=1e-6, rtol=1e-5)
    engine.close(YOU, CloseMessage(1)).result(WAIT_S)
    assert not any(layer.isnan().any() for layer in engine.kv.keys_SHLE)


def test_a_step_that_fails_costs_its_own_session_only(engine, trunk):
    texts = {1: tokens(4, seed=1), 2: tokens(4, seed=2)}
    expected = alone(trunk, texts[1])
    original = engine._runner.run

    def fails_with_session_2(plan, *args, **kwargs):
        if any(slot == 1 for slot in plan.slots):
            raise RuntimeError("broken")
        return original(plan, *args, **kwargs)

    engine._runner.run = fails_with_session_2
    futures = {session: engine.submit(ME, step(1, text, session)) for session, text in texts.items()}
    engine.start()
    torch.testing.assert_close(result(futures[1]), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(TrunkFailed, match="incident"):
        result(futures[2])
    with pytest.raises(SessionLost):
        result(engine.submit(ME, step(2, tokens(1), 2)))
    assert engine.kv.free_bytes == engine.kv.total_bytes - engine.kv.slot_bytes


def count_runs(engine) -> list:
    """The plans that the runner is given from now on."""
    plans: list = []
    original = engine._runner.run
    engine._runner.run = lambda plan, *args, **kwargs: plans.append(plan) or original(plan, *args, **kwargs)
    return plans


def test_a_step_whose_client_gave_up_is_not_run(engine):
    late = engine.submit(ME, step(1, tokens(4), deadline_s=1e-6))
    cancelled = engine.submit(ME, step(1, tokens(4), 2))
    cancelled.cancel()
    ran = count_runs(engine)
    engine.start()
    with pytest.raises(StepTimeout):
        result(late)
    assert result(engine.submit(ME, step(1, tokens(4), 3))).shape == (1, 4, HIDDEN)
    assert [plan.tokens for plan in ran] == [4], "session 3's alone"
    assert engine.open_sessions == 1, "what was not run opened nothing that lasts"


def test_a_closed_session_runs_no_further_step(engine):
    waiting = engine.submit(ME, step(1, tokens(4)))
    closing = engine.close(ME, CloseMessage(1))
    ran = count_runs(engine)
    engine.start()
    with pytest.raises(SessionLost):
        result(waiting)
    closing.result(WAIT_S)
    assert ran == []
    assert engine.kv.free_bytes == engine.kv.total_bytes, "the close came after the opening"


def test_a_lone_forward_leaves_nothing_behind(engine, trunk):
    engine.start()
    text = tokens(7, rows=2)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    answer = result(engine.submit(ME, StepMessage(StepKey(step=1), text, mask_columns_BT=mask)))
    with torch.no_grad():
        expected = trunk(text, attention_mask=mask.long(), position_ids=torch.arange(7).expand(2, 7))
    assert torch.equal(answer, expected)
    assert engine.open_sessions == 0
    assert engine.kv.free_bytes == engine.kv.total_bytes


def test_a_fork_goes_its_own_way(engine, trunk):
    engine.start()
    text, left, right = tokens(5), tokens(1, seed=8), tokens(1, seed=9)
    result(engine.submit(ME, step(1, text)))
    engine.fork(ME, ForkMessage(1, 2, at_step=1)).result(WAIT_S)
    for session, number, more in ((1, 2, left), (2, 1, right)):
        message = StepMessage(StepKey(session=session, step=number), more)
        expected = alone(trunk, torch.cat([text, more], 1))[:, -1:]
        torch.testing.assert_close(result(engine.submit(ME, message)), expected, atol=1e-6, rtol=1e-5)


def test_what_no_session_and_no_run_of_this_server_does_is_refused(engine):
    engine.start()
    with pytest.raises(RunLost):
        result(engine.submit(ME, RunStepMessage(StepKey(run=1, step=1), tokens(1))))
    with pytest.raises(MessageError, match="belong to a run"):
        result(engine.submit(ME, StepMessage(StepKey(session=1, step=1, phase=Phase.BACKWARD), tokens(1))))
    opening = OpenSession(precision=Precision(weights="bfloat16"))
    with pytest.raises(SettingError, match="float32"):
        result(engine.submit(ME, StepMessage(StepKey(session=1, step=1), tokens(1), open=opening)))


def test_a_draining_engine_opens_nothing_and_finishes_what_is_open(engine):
    engine.start()
    result(engine.submit(ME, step(1, tokens(4))))
    engine.drain()
    result(engine.submit(ME, step(2, tokens(1))))
    with pytest.raises(TrunkDraining):
        result(engine.submit(ME, step(1, tokens(4), 2)))
    with pytest.raises(TrunkDraining):
        engine.fork(ME, ForkMessage(1, 2, at_step=2))


def test_a_stopped_engine_answers_what_still_waits(trunk):
    engine = Engine(trunk, BatchingConfig(), SessionConfig(kv_budget_bytes=1 << 20, session_tokens=64))
    engine._stopping.set()
    waiting = engine.submit(ME, step(1, tokens(4)))
    forking = engine.fork(ME, ForkMessage(1, 2))
    engine.start()
    with pytest.raises(SessionLost):
        forking.result(WAIT_S)
    with pytest.raises(TrunkDraining):
        result(waiting)


def submitted_at_once(engine, number, sessions):
    """The engine sees all of them or none: one that it ran alone would be waited for by the others."""
    all_there = threading.Event()
    engine._queue.ask(lambda: all_there.wait(WAIT_S))
    futures = [engine.submit(ME, step(number, tokens(1), session)) for session in sessions]
    all_there.set()
    return futures


def test_a_lone_step_waits_for_sessions_that_come_back(trunk):
    sessions = SessionConfig(kv_budget_bytes=1 << 20, session_tokens=64)
    engine = Engine(trunk, BatchingConfig(wait_ms=WAIT_S * 1000), sessions)
    openings = [engine.submit(ME, step(1, tokens(4), session)) for session in (1, 2)]
    engine.start()
    for opening in openings:
        result(opening)
    for number in (2, 3):
        for future in submitted_at_once(engine, number, sessions=(1, 2)):
            result(future)
    ran = count_runs(engine)
    first = engine.submit(ME, step(4, tokens(1), 1))
    engine._queue.ask(lambda: None).result(WAIT_S)
    assert ran == []
    second = engine.submit(ME, step(4, tokens(1), 2))
    result(first)
    result(second)
    assert [len(plan.steps) for plan in ran] == [2]
    engine.stop()


def test_an_engine_that_waits_for_company_stops_at_once(trunk):
    sessions = SessionConfig(kv_budget_bytes=1 << 20, session_tokens=64)
    engine = Engine(trunk, BatchingConfig(wait_ms=1e9), sessions)
    engine.start()
    for number in (1, 2, 3):
        for future in submitted_at_once(engine, number, sessions=(1, 2)):
            result(future)
    waiting = engine.submit(ME, step(4, tokens(1), 1))
    engine._queue.ask(lambda: None).result(WAIT_S)
    assert not waiting.done()
    engine.stop()
    assert waiting.done()
    assert not engine._thread.is_alive()


def test_an_engine_that_fails_says_so_and_leaves_nobody_waiting(trunk):
    engine = Engine(trunk, BatchingConfig(), SessionConfig(kv_budget_bytes=1 << 20, session_tokens=64))
    told = threading.Event()
    engine.on_failure = told.set

    def broken(*args, **kwargs):
        raise RuntimeError("the device is gone")

    engine._runner.run = engine.kv.give_back = broken
    first, second = engine.submit(ME, step(1, tokens(4))), engine.submit(ME, step(1, tokens(9), 2))
    engine.start()
    with pytest.raises(TrunkFailed):
        result(first)
    with pytest.raises(TrunkDraining):
        result(second)
    assert told.wait(WAIT_S)
    assert isinstance(engine.failure, RuntimeError)
    with pytest.raises(TrunkDraining):
        result(engine.submit(ME, step(1, tokens(4), 3)))
    with pytest.raises(TrunkDraining):
        engine.close(ME, CloseMessage(1)).result(WAIT_S)


def test_a_request_whose_client_gave_up_is_not_done_and_harms_nobody(trunk):
    engine = Engine(trunk, BatchingConfig(), SessionConfig(kv_budget_bytes=1 << 20, session_tokens=64))
    opened = engine.submit(ME, step(1, tokens(3)))
    given_up = engine.fork(ME, ForkMessage(1, 2, at_step=1))
    given_up.cancel()
    engine.start()
    assert opened.result(WAIT_S).error is None
    assert engine.fork(ME, ForkMessage(1, 3, at_step=1)).result(WAIT_S) is None
    assert engine.open_sessions == 2
    engine.stop()
