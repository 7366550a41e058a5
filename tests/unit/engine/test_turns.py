"""Through the engine: a text, a long prompt and a training take turns, and none waits for all of another."""

from concurrent.futures import Future

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitlearn.config import BatchingConfig, SessionConfig
from splitlearn.engine.engine import Engine
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.testing.tiny import tiny_config
from splitlearn.vocabulary import LoraSettings, Phase, RunSettings, StepKey
from splitlearn.wire.messages import AnswerMessage, OpenRun, OpenSession, RunStepMessage, StepMessage

WAIT_S = 20
CHUNK, PIECES, TRAINED, WRITTEN = 4, 10, 10, 30
WRITER, READER, TRAINER = b"writer", b"reader", b"trainer"


@pytest.fixture
def engine():
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    trunk = TrunkSegment.of_whole(whole, SplitPlan(6, 2, 2))
    sessions = SessionConfig(kv_budget_bytes=1 << 20, session_tokens=64)
    made = Engine(trunk, BatchingConfig(prefill_chunk_tokens=CHUNK), sessions)
    made.start()
    yield made
    made.stop()


def tokens(count: int) -> torch.Tensor:
    return torch.randn(1, count, 32, generator=torch.Generator().manual_seed(count))


def write(engine: Engine, number: int, last: Future[AnswerMessage]) -> None:
    """A step as soon as the one before it is answered, on the engine's own thread."""
    opening = OpenSession() if number == 1 else None
    message = StepMessage(StepKey(session=1, step=number), tokens(1), open=opening)

    def go_on(answered: Future[AnswerMessage]) -> None:
        if number == WRITTEN or answered.result().error is not None:
            last.set_result(answered.result())
        else:
            write(engine, number + 1, last)

    engine.submit(WRITER, message).add_done_callback(go_on)


def submit_all(engine: Engine, run: int, incarnation: int) -> list[Future[AnswerMessage]]:
    """The prompt and the training first: both are older than any step of the text."""
    futures = [engine.submit(READER, StepMessage(StepKey(session=1, step=1), tokens(40), open=OpenSession()))]
    for number in range(TRAINED):
        key = StepKey(run=run, incarnation=incarnation, step=1, microbatch=number, phase=Phase.EVALUATE)
        futures.append(engine.submit(TRAINER, RunStepMessage(key, tokens(6))))
    text: Future[AnswerMessage] = Future()
    write(engine, 1, text)
    return [*futures, text]


def count_turns(engine: Engine) -> list[bytes]:
    """Whose turn it was, one after the other."""
    turns: list[bytes] = []
    choose = engine._ready.next_batch

    def next_batch():
        batch = choose()
        turns.append(batch[0].step.client)
        return batch

    engine._ready.next_batch = next_batch
    return turns


def test_text_prompt_and_training_take_turns(engine):
    opened = OpenRun("run", RunSettings(lora=LoraSettings(r=2, target_modules=("q_proj",))))
    run = engine.runs.open(TRAINER, opened).result(WAIT_S)
    turns = count_turns(engine)
    futures: list[Future[AnswerMessage]] = []
    engine._queue.ask(lambda: futures.extend(submit_all(engine, run.number, run.incarnation))).result(WAIT_S)
    for future in futures:
        assert future.result(WAIT_S).error is None
    first_text = turns.index(WRITER)
    assert first_text <= 1
    for turn in range(first_text, 2 * (PIECES + TRAINED), 2):
        assert turns[turn] == WRITER, "the text waits for one other turn at a time"
    others = [client for client in turns if client != WRITER]
    assert others[: 2 * PIECES : 2] == [READER] * PIECES
    assert others[1 : 2 * TRAINED : 2] == [TRAINER] * TRAINED


def test_rows_of_a_batch_lie_as_their_slots_do_whatever_order_their_steps_came_in(engine):
    """So that neighbouring slots are read as they lie, without a copy."""
    plans: list = []
    run = engine._runner.run
    engine._runner.run = lambda plan, *args, **kwargs: plans.append(plan) or run(plan, *args, **kwargs)
    for session in (1, 2, 3):
        opening = StepMessage(StepKey(session=session, step=1), tokens(1), open=OpenSession())
        engine.submit(WRITER, opening).result(WAIT_S)
    futures: list[Future[AnswerMessage]] = []

    def submit_backwards() -> None:
        for session in (3, 1, 2):
            futures.append(
                engine.submit(WRITER, StepMessage(StepKey(session=session, step=2), tokens(session)[:, :1]))
            )

    engine._queue.ask(submit_backwards).result(WAIT_S)
    assert all(future.result(WAIT_S).error is None for future in futures)
    assert plans[-1].slots == (0, 1, 2)
