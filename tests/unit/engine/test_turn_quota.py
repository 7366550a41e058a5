"""While others write, one client's prompts and training steps meet one in so many of their steps."""

from types import SimpleNamespace

import pytest
import torch

from splitlearn.engine.ready_step import ReadyRunStep, ReadyStep
from splitlearn.engine.session import Session
from splitlearn.engine.step import Step
from splitlearn.engine.turn_quota import TEXT_LASTS_S, TurnQuota
from splitlearn.vocabulary import Phase, Precision, StepKey
from splitlearn.wire.messages import RunStepMessage, StepMessage

WRITER, READER, TRAINER = b"writer", b"reader", b"trainer"


def prompt(client: bytes = READER, tokens: int = 500) -> ReadyStep:
    message = StepMessage(StepKey(session=1, step=1), torch.zeros(1, tokens, 1))
    return ReadyStep(Step(client, message), Session((client, 1), 0, Precision(), (0,), 0.0))


def training(phase: Phase) -> ReadyRunStep:
    tensor = torch.zeros(1, 8, 1) if phase in (Phase.FORWARD, Phase.BACKWARD) else None
    return ReadyRunStep(Step(TRAINER, RunStepMessage(StepKey(run=1, phase=phase), tensor)), SimpleNamespace())


def write(quota: TurnQuota, batches: int, *clients: bytes, now: float = 0.0) -> None:
    for _ in range(batches):
        quota.ran(set(clients or (WRITER,)), now)


def test_without_a_share_nobody_is_held_back():
    quota = TurnQuota(None)
    write(quota, 3)
    assert not any(quota.holds_back(prompt(), 0.0) for _ in range(9))


def test_while_others_write_there_is_one_turn_for_so_many_of_their_batches():
    quota, turns = TurnQuota(0.1), 0
    write(quota, 1)
    assert not quota.holds_back(prompt(), 0.0)
    assert all(quota.holds_back(prompt(), 0.0) for _ in range(5))
    for _ in range(40):
        write(quota, 1)
        turns += len(list(quota.released(0.0)))
    assert turns == 4
    assert len(quota) == 1


def test_a_clients_own_text_and_one_that_stands_still_keep_it_from_nothing():
    quota = TurnQuota(0.1)
    write(quota, 3, READER)
    assert not any(quota.holds_back(prompt(), 0.0) for _ in range(9))
    write(quota, 1, WRITER)
    assert quota.holds_back(prompt(), 0.0)
    write(quota, 99, READER)
    assert list(quota.released(0.0)) == [], "its own batches do not count"
    assert len(list(quota.released(TEXT_LASTS_S))) == 1


def test_batches_that_it_shares_with_others_count():
    quota = TurnQuota(0.1)
    write(quota, 1)
    assert [quota.holds_back(prompt(), 0.0) for _ in range(2)] == [False, True]
    write(quota, 10, WRITER, READER)
    assert len(list(quota.released(0.0))) == 1


def test_texts_and_what_carries_no_tensor_are_never_held_back():
    quota = TurnQuota(0.1)
    write(quota, 1)
    assert not any(quota.holds_back(prompt(tokens=1), 0.0) for _ in range(9))
    steps = [training(phase) for phase in (Phase.FORWARD, Phase.OPTIMIZER_STEP, Phase.BACKWARD)]
    assert [quota.holds_back(each, 0.0) for each in steps] == [False, False, True]
    assert not quota.holds_back(prompt(), 0.0), "each client has turns of its own"


def test_a_step_that_is_taken_out_is_gone():
    quota, gone = TurnQuota(0.1), prompt()
    write(quota, 1)
    quota.holds_back(prompt(), 0.0)
    assert quota.holds_back(gone, 0.0)
    assert quota.take_out_where(lambda each: each is gone) == [gone]
    assert len(quota) == 0
    assert list(quota.released(99.0)) == []


@pytest.mark.parametrize(("batches", "now", "known"), [(1, 0.0, True), (10, 0.0, False), (1, 9.0, False)])
def test_only_who_still_waits_for_its_turn_is_remembered(batches, now, known):
    quota = TurnQuota(0.1)
    write(quota, 1)
    quota.holds_back(prompt(), 0.0)
    write(quota, batches)
    quota.forget_idle(now)
    assert (READER in quota._last_turn) == known
