"""Whose tokens a second are spent waits, in its own order and within its deadline; nobody else does."""

import pytest
import torch

from splitlearn.config import QuotaConfig
from splitlearn.engine.pacing import Pacing
from splitlearn.engine.ready_step import ReadyStep
from splitlearn.engine.step import Step
from splitlearn.errors import ResourceExhausted
from splitlearn.vocabulary import StepKey
from splitlearn.wire.messages import StepMessage

ME, YOU = b"me", b"you"


def step(tokens: int = 1, client: bytes = ME, *, rows: int = 1, deadline_s: float = 0.0) -> ReadyStep:
    message = StepMessage(StepKey(step=1), torch.zeros(rows, tokens, 1), deadline_s=deadline_s)
    return ReadyStep(Step(client, message, arrived_at=0.0), None)


def pacing(rate: float = 10.0, burst: int | None = None) -> Pacing:
    return Pacing(QuotaConfig(max_tokens_per_s=rate, burst_tokens=burst))


def test_without_a_quota_nobody_is_held_back():
    made = Pacing(QuotaConfig())
    assert not any(made.holds_back(step(10**6), 0.0) for _ in range(9))
    assert (len(made), made.is_broke(ME, 0.0)) == (0, False)


def test_a_seconds_worth_goes_at_once_and_what_follows_at_the_rate():
    made = pacing(rate=10.0)
    held = [made.holds_back(step(), 0.0) for _ in range(15)]
    assert held == [False] * 11 + [True] * 4, "who is at nought is not in debt yet"
    counts = [len(list(made.released(now))) for now in (0.05, 0.11, 0.15, 0.21, 0.31, 0.41, 9.0)]
    assert counts == [0, 1, 0, 1, 1, 1, 0]


def test_on_average_nobody_has_more_than_the_rate_whatever_the_size_of_its_steps():
    made, done, now = pacing(rate=100.0), 0, 0.0
    made.holds_back(step(), now)
    for size in (1, 7, 300, 50, 1000, 3) * 20:
        while made.is_broke(ME, now):
            now += 0.01
        assert not made.holds_back(step(size), now)
        done += size
    while made.is_broke(ME, now):
        now += 0.01
    assert done <= 100 * now + 100


def test_a_burst_is_saved_up_and_no_more_than_that():
    made = pacing(rate=10.0, burst=50)
    assert not made.holds_back(step(50), 0.0)
    assert not made.holds_back(step(50), 1000.0)
    assert not made.holds_back(step(1), 1000.0)
    assert made.holds_back(step(1), 1000.0)


def test_rows_count():
    made = pacing(rate=10.0)
    made.holds_back(step(5, rows=4), 0.0)
    assert made.next_in_s(0.0, at_most=99.0) == 99.0, "nothing waits"
    assert made.holds_back(step(), 0.0)
    assert made.next_in_s(0.0, at_most=99.0) == pytest.approx(1.0)


def test_a_client_keeps_its_order_and_others_go_on():
    made = pacing(rate=10.0)
    made.holds_back(step(20), 0.0)
    mine = [step(4), step(1), step(1)]
    assert all(made.holds_back(each, 0.0) for each in mine)
    assert not made.holds_back(step(1, YOU), 0.0)
    assert (made.is_broke(ME, 0.0), made.is_broke(YOU, 0.0)) == (True, False)
    assert list(made.released(1.05)) == mine[:1]
    assert list(made.released(1.5)) == mine[1:]


def test_a_step_that_would_wait_beyond_its_deadline_is_refused_at_once_and_told_for_how_long():
    made = pacing(rate=10.0)
    made.holds_back(step(30), 0.0)
    assert made.holds_back(step(30, deadline_s=2.5), 0.0)
    with pytest.raises(ResourceExhausted, match=r"your own quota.* 10 tokens/s") as refused:
        made.holds_back(step(3, deadline_s=4.5), 0.0)
    assert refused.value.facts == {
        "wanted_tokens": 3,
        "held_tokens": -50,
        "limit_tokens_per_s": 10.0,
        "retry_after_ms": 5000,
    }
    assert made.holds_back(step(3, deadline_s=5.5), 0.0)
    assert len(made) == 2, "what was refused does not wait"
    assert not made.holds_back(step(3, YOU, deadline_s=0.1), 0.0)


def test_a_step_that_is_taken_out_is_not_paid_for():
    made = pacing(rate=10.0)
    made.holds_back(step(20), 0.0)
    gone, stays = step(1000), step(1)
    assert made.holds_back(gone, 0.0)
    assert made.holds_back(stays, 0.0)
    assert made.take_out_where(lambda each: each is gone) == [gone]
    assert list(made.released(1.05)) == [stays]
    assert len(made) == 0


def test_whose_purse_is_full_again_is_forgotten():
    made = pacing(rate=10.0)
    made.holds_back(step(5), 0.0)
    made.forget_full(0.2)
    assert made._purses
    made.forget_full(1.0)
    assert not made._purses
