"""A long step runs in pieces: the answer is the same, and between two pieces others have their turn."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitlearn.config import BatchingConfig, SessionConfig
from splitlearn.engine.engine import Engine
from splitlearn.errors import SessionLost, StepOutOfOrder, StepTimeout, TrunkFailed
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.testing.tiny import tiny_config
from splitlearn.vocabulary import StepKey
from splitlearn.wire.messages import AnswerMessage, CloseMessage, ForkMessage, OpenSession, StepMessage

WAIT_S = 20
ME, YOU = b"me", b"you"
CHUNK = 4
SESSIONS = SessionConfig(kv_budget_bytes=1 << 20, session_tokens=64)


@cache
def trunk_of(family: str) -> TrunkSegment:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    with torch.no_grad():
        for weight in whole.parameters():
            weight.mul_(5.0)  # so that a token depends on those before it
    return TrunkSegment.of_whole(whole, SplitPlan(6, 2, 2))


@contextmanager
def running(
    family: str = "llama", chunk: int = CHUNK, batch_tokens: int = 4096, **sessions
) -> Iterator[Engine]:
    config = SESSIONS.model_copy(update=sessions)
    batching = BatchingConfig(prefill_chunk_tokens=chunk, max_batch_tokens=batch_tokens)
    engine = Engine(trunk_of(family), batching, config)
    engine.start()
    yield engine
    engine.stop()


def tokens(count: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, count, 32, generator=torch.Generator().manual_seed(seed))


def step(number: int, activation: torch.Tensor, session: int = 1, **fields) -> StepMessage:
    opening = OpenSession() if number == 1 else None
    return StepMessage(StepKey(session=session, step=number), activation, **({"open": opening} | fields))


def result(future: Future[AnswerMessage]) -> torch.Tensor:
    answer = future.result(WAIT_S)
    if answer.error is not None:
        raise answer.error
    return answer.activation_BTD


def between(engine: Engine, piece: int, do) -> list:
    """Has something done on the engine's thread before this piece (from 0); the plans that run."""
    plans: list = []
    original = engine._run_next_batch

    def run_next_batch() -> None:
        if len(plans) == piece:
            do()
            engine._accept()
        original()

    run = engine._runner.run
    engine._runner.run = lambda plan, *args, **kwargs: plans.append(plan) or run(plan, *args, **kwargs)
    engine._run_next_batch = run_next_batch
    return plans


def answers(family: str, chunk: int, messages: list[StepMessage]) -> list[torch.Tensor]:
    with running(family, chunk) as engine:
        return [result(engine.submit(ME, message)) for message in messages]


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def padded_prompt() -> tuple[list[StepMessage], torch.Tensor]:
    """A row is padded by more than a piece; positions count what is not padding."""
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[1, : CHUNK + 2] = False
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    later = positions[:, -1:] + 1
    messages = [
        step(1, tokens(15, rows=2), mask_columns_BT=mask, positions_BT=positions),
        step(2, tokens(1, rows=2, seed=1), positions_BT=later),
    ]
    return messages, mask


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "gpt_oss", "deepseek_v3"])
def test_a_prompt_in_pieces_gives_what_it_gives_whole(family):
    """Longer than a tiny model's sliding window of 8, the last piece shorter than the others."""
    messages = [step(1, tokens(18, rows=2)), step(2, tokens(1, rows=2, seed=1))]
    for whole, pieces in zip(answers(family, 64, messages), answers(family, CHUNK, messages), strict=True):
        assert whole.shape == pieces.shape
        assert relative(pieces, whole) <= 1e-5


@pytest.mark.parametrize(("batch_tokens", "a_row"), [(8, 2), (1, 1), (4096, CHUNK)])
def test_a_prompt_of_many_rows_runs_in_pieces_that_a_batch_takes(batch_tokens, a_row):
    message = step(1, tokens(12, rows=4))
    with running(batch_tokens=batch_tokens) as engine:
        plans = between(engine, 0, lambda: None)
        in_pieces = result(engine.submit(ME, message))
    assert len(plans) == 12 // a_row
    assert relative(in_pieces, answers("llama", 64, [message])[0]) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "gpt_oss"])
def test_a_padded_prompt_in_pieces_gives_what_it_gives_whole(family):
    messages, mask = padded_prompt()
    whole, pieces = answers(family, 64, messages), answers(family, CHUNK, messages)
    assert relative(pieces[0][mask], whole[0][mask]) <= 1e-5
    assert relative(pieces[1], whole[1]) <= 1e-5


def test_the_comparison_would_see_a_piece_that_forgot_those_before_it():
    message = step(1, tokens(18))
    (whole,) = answers("llama", 64, [message])
    with running() as engine:
        between(engine, 1, lambda: engine.kv.wipe((0,), 0, CHUNK))
        assert relative(result(engine.submit(ME, message)), whole) > 1e-3


def test_positions_that_are_given_go_with_their_tokens():
    shifted = torch.arange(7, 7 + 11)[None]
    messages = [step(1, tokens(11), positions_BT=shifted)]
    (whole,), (pieces,) = answers("gemma", 64, messages), answers("gemma", CHUNK, messages)
    (plain,) = answers("gemma", CHUNK, [step(1, tokens(11), positions_BT=shifted.roll(1))])
    assert relative(pieces, whole) <= 1e-5
    assert relative(plain, whole) > 1e-4


def test_crop_and_selection_happen_once_before_the_first_piece():
    messages = [
        step(1, tokens(9, rows=3)),
        step(2, tokens(10, rows=2, seed=1), keep_positions=6, select_rows=(2, 0)),
        step(3, tokens(1, rows=2, seed=2)),
    ]
    for whole, pieces in zip(answers("llama", 64, messages), answers("llama", 3, messages), strict=True):
        assert relative(pieces, whole) <= 1e-5


def test_families_that_are_not_proven_in_a_batch_run_their_prompts_whole():
    with running("bloom") as engine:
        plans = between(engine, -1, lambda: None)
        result(engine.submit(ME, step(1, tokens(18))))
        assert [plan.tokens for plan in plans] == [18]


def test_other_steps_run_between_two_pieces_and_each_gets_its_own():
    short = step(1, tokens(3, seed=5), 2)
    (alone,) = answers("llama", 64, [short])
    (long,) = answers("llama", 64, [step(1, tokens(18))])
    futures = []
    with running() as engine:
        plans = between(engine, 1, lambda: futures.append(engine.submit(YOU, short)))
        assert relative(result(engine.submit(ME, step(1, tokens(18)))), long) <= 1e-5
        assert relative(result(futures[0]), alone) <= 1e-5
    assert [plan.tokens for plan in plans] == [4, 3, 4, 4, 4, 2]


def test_pieces_of_several_sessions_run_as_one_batch():
    messages = [step(1, tokens(10, seed=n), n) for n in (1, 2)]
    expected = answers("llama", 64, messages)
    with running() as engine:
        futures: list = []
        plans = between(engine, -1, lambda: None)
        engine._queue.ask(lambda: futures.extend(engine.submit(ME, each) for each in messages)).result(WAIT_S)
        for future, whole in zip(futures, expected, strict=True):
            assert relative(result(future), whole) <= 1e-5
    assert [(plan.tokens, len(plan.steps)) for plan in plans] == [(4, 2), (4, 2), (2, 2)]


def test_a_piece_that_fails_costs_the_session_and_is_said():
    with running() as engine:
        original = engine._runner.run

        def fails_at_the_third(plan, *args, **kwargs):
            if plan.lengths == (2 * CHUNK,):
                raise RuntimeError("broken")
            return original(plan, *args, **kwargs)

        engine._runner.run = fails_at_the_third
        with pytest.raises(TrunkFailed, match="incident"):
            result(engine.submit(ME, step(1, tokens(18))))
        assert engine.open_sessions == 0
        assert result(engine.submit(ME, step(1, tokens(3), 2))).shape[1] == 3
        assert engine.kv.free_bytes == engine.kv.total_bytes - engine.kv.slot_bytes


def test_a_step_whose_deadline_passes_between_two_pieces_is_given_up_and_its_session_closed():
    with running() as engine:
        result(engine.submit(ME, step(1, tokens(3))))
        message = step(2, tokens(18), deadline_s=1000.0)

        def pass_the_deadline() -> None:
            next(iter(engine._ready)).step.arrived_at -= 2000.0

        plans = between(engine, 2, pass_the_deadline)
        with pytest.raises(StepTimeout, match="8 of the step's 18 tokens"):
            result(engine.submit(ME, message))
        assert len(plans) == 2
        with pytest.raises(SessionLost):
            result(engine.submit(ME, message))
        assert engine.kv.free_bytes == engine.kv.total_bytes
        assert not any(layer.any() for layer in engine.kv.keys_SHLE), "nothing of it is left for the next"


def test_a_session_closed_between_two_pieces_runs_no_further_one():
    short = step(1, tokens(3, seed=5), 2)
    (alone,) = answers("llama", 64, [short])
    with running() as engine:
        other: list = []

        def close() -> None:
            engine.close(ME, CloseMessage(1))
            other.append(engine.submit(YOU, short))

        plans = between(engine, 2, close)
        with pytest.raises(SessionLost, match="closed while"):
            result(engine.submit(ME, step(1, tokens(18))))
        assert relative(result(other[0]), alone) <= 1e-5, "it got the same slot, and nothing else"
        assert [plan.tokens for plan in plans] == [4, 4, 3]
        assert [plan.slots for plan in plans] == [(0,), (0,), (0,)]


def test_a_session_cannot_be_forked_between_two_pieces():
    forks: list = []
    with running() as engine:
        first = step(1, tokens(18))
        between(engine, 2, lambda: forks.append(engine.fork(ME, ForkMessage(1, 2, at_step=0))))
        result(engine.submit(ME, first))
        with pytest.raises(StepOutOfOrder):
            forks[0].result(WAIT_S)
        engine.fork(ME, ForkMessage(1, 2, at_step=1)).result(WAIT_S)
        more = tokens(1, seed=9)
        own, child = (
            result(engine.submit(ME, StepMessage(StepKey(session=session, step=number), more)))
            for session, number in ((1, 2), (2, 1))
        )
        assert relative(child, own) <= 1e-6


def test_the_same_step_asked_again_between_two_pieces_is_answered_with_the_first():
    again: list = []
    with running() as engine:
        message = step(1, tokens(18))
        plans = between(engine, 2, lambda: again.append(engine.submit(ME, message)))
        assert torch.equal(result(engine.submit(ME, message)), result(again[0]))
    assert len(plans) == 5


def test_a_session_does_not_expire_while_its_step_is_run_in_pieces():
    with running(lease_s=0.001) as engine:
        between(engine, 2, lambda: engine._sessions.expire(float("inf")))
        assert result(engine.submit(ME, step(1, tokens(18)))).shape[1] == 18


def test_a_client_that_leaves_between_two_pieces_keeps_its_session_for_a_short_while_only():
    with running(orphan_lease_s=5.0) as engine:
        between(engine, 2, lambda: engine.leave(ME))
        assert result(engine.submit(ME, step(1, tokens(18)))).shape[1] == 18
        (session,) = engine._sessions._sessions.values()
        assert session.lease_s == 5.0
        result(engine.submit(ME, step(2, tokens(1))))
        assert session.lease_s == SESSIONS.lease_s, "it came back"
