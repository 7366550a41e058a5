"""Steps run together only where their results stay those of each alone."""

import torch

from splitlearn.config import BatchingConfig
from splitlearn.engine.batcher import Batcher
from splitlearn.engine.ready_step import ReadyStep
from splitlearn.engine.session import Session
from splitlearn.engine.step import Step
from splitlearn.engine.trunk_state import BARE, AdapterVersion
from splitlearn.vocabulary import Precision, StepKey
from splitlearn.wire.messages import StepMessage


def ready(
    tokens: int = 1,
    rows: int = 1,
    *,
    session: bool = True,
    autocast: str = "",
    adapter: AdapterVersion = BARE,
) -> ReadyStep:
    step = Step(b"", StepMessage(StepKey(session=1, step=1), torch.zeros(rows, tokens, 4)))
    owner = Session((b"", 1), 0, Precision(autocast=autocast), tuple(range(rows)), 0.0, adapter=adapter)
    return ReadyStep(step, owner if session else None)


def choose(*waiting: ReadyStep, batched: bool = True, **config) -> list[ReadyStep]:
    return Batcher(BatchingConfig(**config), batched=batched).choose(waiting[0], waiting)


def test_steps_of_as_many_tokens_run_together():
    first, prefill, third = ready(), ready(tokens=9), ready(rows=3)
    assert choose(first, prefill, third) == [first, third]


def test_the_step_whose_turn_it_is_always_runs_however_large():
    huge = ready(tokens=500)
    assert choose(huge, ready(), max_batch_tokens=100) == [huge]


def test_a_batch_stays_within_its_rows_and_tokens():
    steps = [ready(rows=2) for _ in range(4)]
    assert choose(*steps, max_batch_rows=5) == steps[:2]
    steps = [ready(tokens=10) for _ in range(4)]
    assert choose(*steps, max_batch_tokens=30) == steps[:3]


def test_steps_without_a_session_run_one_by_one():
    lone, other = ready(session=False), ready()
    assert choose(lone, other) == [lone]
    assert choose(other, lone) == [other]


def test_families_that_are_not_proven_in_a_batch_run_one_by_one():
    first, second = ready(), ready()
    assert choose(first, second, batched=False) == [first]


def test_precisions_are_not_mixed():
    first, second, third = ready(), ready(autocast="bfloat16"), ready()
    assert choose(first, second, third) == [first, third]


def test_adapters_are_mixed_where_both_may_be():
    banked, also, apart = (AdapterVersion(name) for name in ("banked", "also", "apart"))
    batcher = Batcher(BatchingConfig(), batched=True, mixes=lambda adapter: adapter is not apart)
    bare, first, second, third, fourth = (ready(adapter=each) for each in (BARE, banked, also, apart, apart))
    waiting = [bare, first, second, third, fourth]
    assert batcher.choose(first, waiting) == [first, bare, second]
    assert batcher.choose(third, waiting) == [third, fourth]
    assert choose(*waiting) == [bare], "unless told so, none is mixed"
