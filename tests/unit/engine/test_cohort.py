"""Rounds are closed by their rule, waited for by those who are there, and answered once."""

import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from splitlearn.engine import merge
from splitlearn.engine.cohort import Cohort
from splitlearn.engine.ledger import read
from splitlearn.engine.member import NEXT, Event, Member, State
from splitlearn.engine.rules import require_known
from splitlearn.engine.run import Run
from splitlearn.engine.step import Step
from splitlearn.errors import (
    AccessDenied,
    CheckpointError,
    ContributionLost,
    MessageError,
    RoundUnfinished,
    RunLost,
    SettingError,
    StaleGradient,
    StepOutOfOrder,
)
from splitlearn.monitor.events import RoundClosed
from splitlearn.vocabulary import CohortSettings, Fate, OptimizerSettings, RunSettings
from splitlearn.wire.messages import AnswerMessage, OptimizerStep, RunStepMessage

RATE = 0.5
SGD = OptimizerSettings("sgd", learning_rate=RATE)
SYNC = CohortSettings("sync", members=2)
LEASE_S = 100.0


def numbers(seed: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)]


class Desk:
    """A cohort without an engine: clients whose gradients are drawn."""

    def __init__(
        self, settings: CohortSettings, *names: str, changed: Callable[[], None] | None = None
    ) -> None:
        weights = dict(zip(("lower", "upper"), numbers(0), strict=True))
        self.run = Run("notes", RunSettings(optimizer=SGD, cohort=settings), None, weights, b"")
        self.cohort = self.run.cohort = Cohort(self.run, LEASE_S, changed)
        for name in names:
            self.cohort.join(name.encode(), name)

    def member(self, name: str) -> Member:
        return self.cohort.members[name]

    def compute(self, name: str, seed: int) -> list[Tensor | None]:
        """A forward and a backward; the gradients."""
        gradients = numbers(seed)
        self.member(name).pin()
        self.member(name).contribution.add(gradients)
        return gradients

    def give(self, name: str, weight: float = 1.0, **how) -> AnswerMessage | None:
        member = self.member(name)
        step = how.pop("step", member.next_step)
        asked = OptimizerStep(1.0, how.pop("rate", RATE), how.pop("skip", False), weight)
        return self.cohort.take(member, RunStepMessage(member.step_key(step), optimizer=asked))

    def work(self, name: str, seed: int, weight: float = 1.0, **how) -> AnswerMessage | None:
        self.compute(name, seed)
        return self.give(name, weight, **how)

    def weights(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.run.masters.values()]

    def moved(self) -> list[Tensor]:
        """What the weights lost so far, over the learning rate: the gradient, after one step."""
        return [(old - new) / RATE for old, new in zip(numbers(0), self.weights(), strict=True)]


def parked(desk: Desk, name: str, deadline_s: float = 0.0):
    member = desk.member(name)
    step = Step(b"", RunStepMessage(member.step_key(member.next_step), deadline_s=deadline_s))
    future = step.wait()
    desk.cohort.park(member, step)
    return future


def union(*parts: tuple[int, float]) -> list[Tensor]:
    """The gradient of the batches taken as one, from each one's mean and its weight."""
    total = sum(weight for _, weight in parts)
    return [sum(numbers(seed)[place] * weight for seed, weight in parts) / total for place in range(2)]


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------- sync


def test_sync_waits_for_all_and_steps_with_the_gradient_of_the_union_batch():
    desk = Desk(SYNC, "a", "b")
    assert desk.work("a", 1, weight=30) is None
    assert desk.run.step == 0
    first = parked(desk, "a")
    answer = desk.work("b", 2, weight=10)
    assert answer.stepped
    assert (answer.merged.fate, answer.merged.round, answer.merged.members) == (Fate.MERGED, 1, 2)
    assert first.result(0).merged == answer.merged
    assert close(desk.moved(), union((1, 30), (2, 10)))
    assert not close(desk.moved(), union((1, 1), (2, 1))), "or a mean of means would do"


def test_the_order_in_which_members_come_changes_no_bit():
    results = []
    for order in ("ab", "ba"):
        desk = Desk(SYNC, "a", "b")
        for name in order:
            desk.work(name, ord(name), weight=ord(name))
        results.append(desk.weights())
    assert all(map(torch.equal, *results))


def test_a_round_waits_until_as_many_have_joined_as_were_expected_and_later_for_who_is_there():
    desk = Desk(SYNC, "a")
    assert desk.work("a", 1) is None
    desk.cohort.join(b"b", "b")
    assert desk.work("b", 2).stepped
    desk.cohort.leave(desk.member("b"))
    assert desk.work("a", 3).merged.members == 1
    desk.cohort.join(b"c", "c")
    assert desk.work("a", 4) is None, "a new member is waited for"


def test_a_round_never_waits_for_a_member_whose_lease_has_run_out():
    desk = Desk(SYNC, "a", "b")
    desk.work("a", 1)
    waiting = parked(desk, "a")
    desk.member("b").lease_until = 0.0
    assert desk.cohort.due_at == 0.0
    desk.cohort.tick(1.0)
    assert desk.member("b").state is State.LAPSED
    assert waiting.result(0).merged.members == 1
    desk.cohort.renew(desk.member("b"))
    assert desk.member("b").state is State.ACTIVE
    assert desk.work("a", 2) is None, "it is back, so it is waited for"


def test_while_the_server_itself_stood_still_no_lease_ran_out():
    desk = Desk(CohortSettings("quorum", members=2, quorum=1, timeout_s=50.0), "a", "b")
    desk.work("a", 1)
    later = time.monotonic() + 1000.0
    desk.cohort.allow(1000.0)
    desk.cohort.tick(later)
    assert desk.member("b").state is State.ACTIVE
    assert desk.run.step == 0, "nor did the quorum's time"
    desk.cohort.tick(later + LEASE_S)
    assert desk.member("b").state is State.LAPSED, "or nobody would ever"


def test_a_wall_clock_that_jumps_ends_no_lease(monkeypatch):
    desk = Desk(SYNC, "a", "b")
    for jump_s in (1e6, -2e6):
        now = time.time() + jump_s
        monkeypatch.setattr(time, "time", lambda now=now: now)
        desk.cohort.tick(time.monotonic())
        assert desk.cohort.active() == {"a", "b"}


def test_what_a_lapsed_member_had_half_computed_is_computed_again():
    desk = Desk(SYNC, "a", "b")
    desk.compute("b", 2)
    desk.member("b").lease_until = 0.0
    desk.cohort.tick(1.0)
    with pytest.raises(ContributionLost, match="compute it again"):
        desk.give("b")
    assert desk.member("b").step == 0


def test_a_gradient_from_before_a_lapse_is_not_used_for_the_step_that_begins_anew():
    """It is of another version than the ledger would say."""
    desk = Desk(CohortSettings("async", members=2), "a", "b")
    member = desk.member("b")
    begun_with = member.pin()
    member.lease_until = 0.0
    desk.cohort.tick(1.0)
    with pytest.raises(ContributionLost):
        desk.cohort.underway.require_underway(member, begun_with)
    desk.work("a", 1)
    member.contribution.add_once((1, 0), numbers(8), 1.0)
    with pytest.raises(ContributionLost):
        desk.give("b")
    assert member.contribution.is_empty
    with pytest.raises(ContributionLost):
        desk.cohort.underway.pinned(member, microbatch=1)
    assert desk.cohort.underway.pinned(member, microbatch=0) is desk.run.current
    assert not member.contribution.has((1, 0)), "or the gradient that comes now would not be added"
    desk.cohort.underway.require_underway(member, member.pin())


def test_the_gradients_of_a_round_that_was_closed_meanwhile_are_computed_again_in_sync():
    desk = Desk(SYNC, "a", "b")
    desk.compute("b", 2)
    base = desk.member("b").base
    desk.cohort.leave(desk.member("b"))
    desk.work("a", 1)
    desk.cohort.join(b"b", "b")
    desk.member("b").base = base
    desk.member("b").contribution.add(numbers(2))
    with pytest.raises(StaleGradient, match="1 versions"):
        desk.give("b")


def test_a_step_asked_twice_counts_once():
    desk = Desk(SYNC, "a", "b")
    assert desk.work("a", 1) is None
    assert desk.give("a") is None, "while it waits"
    answer = desk.work("b", 2)
    before = desk.weights()
    again = desk.give("a", step=1)
    assert again.merged == answer.merged
    assert desk.run.step == 1
    assert all(map(torch.equal, before, desk.weights()))


def test_a_step_that_is_not_the_next_is_out_of_order_and_one_of_long_ago_is_done():
    desk = Desk(SYNC, "a", "b")
    for seed in (1, 2):
        desk.work("a", seed)
        desk.work("b", seed)
    with pytest.raises(StepOutOfOrder):
        desk.give("a", step=4)
    assert desk.give("a", step=1).stepped
    assert desk.run.step == 2


def test_a_member_that_skips_goes_on_and_gives_to_the_same_round_afterwards():
    desk = Desk(SYNC, "a", "b")
    desk.compute("a", 1)
    answer = desk.give("a", skip=True)
    assert not answer.stepped
    assert answer.merged is None
    desk.work("b", 2)
    assert desk.run.step == 0
    assert desk.work("a", 3).merged.members == 2


def test_gradients_that_are_no_numbers_reach_nobody():
    desk = Desk(SYNC, "a", "b")
    desk.member("a").pin()
    desk.member("a").contribution.add([torch.full((3, 2), math.nan), None])
    assert desk.give("a").merged.fate is Fate.DROPPED
    desk.work("b", 2)
    desk.work("a", 3)
    assert all(bool(weight.isfinite().all()) for weight in desk.weights())


def test_clipping_is_of_the_merged_gradient_as_torch_clips():
    desk = Desk(CohortSettings("sync", members=2, clip_norm=0.1), "a", "b")
    desk.work("a", 1, weight=3)
    desk.work("b", 2, weight=1)
    expected = [torch.nn.Parameter(each) for each in union((1, 3), (2, 1))]
    for weight in expected:
        weight.grad = weight.detach().clone()
    torch.nn.utils.clip_grad_norm_(expected, 0.1)
    assert close(desk.moved(), [weight.grad for weight in expected])


# ---------------------------------------------------------------- the other rules


def test_async_with_one_member_is_the_sequence_of_its_steps():
    alone = Desk(CohortSettings("async"), "a")
    plain = Run("plain", RunSettings(optimizer=SGD), None, dict(zip("lu", numbers(0), strict=True)), b"")
    for seed in (1, 2, 3):
        alone.work("a", seed, weight=7.0)
        plain.step_with(numbers(seed), RATE)
    assert all(map(torch.equal, alone.weights(), plain.masters.values()))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_stale_gradients_count_by_the_closed_form(exponent):
    desk = Desk(CohortSettings("async", members=2, staleness_exponent=exponent), "a", "b")
    desk.compute("b", 9)
    for seed in (1, 2, 3):
        desk.work("a", seed)
    before = desk.weights()
    answer = desk.give("b")
    assert answer.merged.staleness == 3
    moved = [(old - new) / RATE for old, new in zip(before, desk.weights(), strict=True)]
    assert close(moved, [gradient * 4**-exponent for gradient in numbers(9)])


def test_what_is_too_stale_is_refused_with_a_typed_error_and_computed_again():
    desk = Desk(CohortSettings("async", members=2, staleness_limit=1), "a", "b")
    desk.compute("b", 9)
    for seed in (1, 2):
        desk.work("a", seed)
    with pytest.raises(StaleGradient) as refused:
        desk.give("b")
    assert refused.value.facts["staleness"] == 2
    assert desk.work("b", 9).merged.staleness == 0


def test_what_is_too_old_in_seconds_is_refused_too():
    desk = Desk(CohortSettings("async", members=2, age_limit_s=60), "a", "b")
    desk.compute("b", 9)
    desk.member("b").began_at -= 61
    with pytest.raises(StaleGradient, match="61 s old"):
        desk.give("b")


def test_quorum_is_closed_by_all_or_by_enough_after_the_timeout():
    desk = Desk(CohortSettings("quorum", members=3, quorum=2, timeout_s=10), "a", "b", "c")
    desk.work("a", 1, weight=5)
    assert desk.cohort.due_at > desk.cohort._open_since + 11, "one is not enough, however long"
    waiting = parked(desk, "a")
    desk.work("b", 2, weight=3)
    assert desk.run.step == 0
    desk.cohort._open_since -= 10
    desk.cohort.tick(0.0)
    assert waiting.result(0).merged.members == 2
    assert close(desk.moved(), union((1, 5), (2, 3))), "renormalised over what arrived"


@pytest.mark.parametrize("carries", [False, True])
def test_what_comes_after_its_quorum_is_dropped_or_carried(carries):
    settings = CohortSettings("quorum", members=2, quorum=1, timeout_s=0, carry_late=carries)
    desk = Desk(settings, "a", "b")
    desk.compute("b", 9)
    desk.work("a", 1)
    before = desk.weights()
    answer = desk.give("b")
    assert answer.merged.fate is (Fate.MERGED if carries else Fate.DROPPED)
    assert answer.stepped is carries
    assert all(map(torch.equal, before, desk.weights())) is not carries
    assert desk.member("b").step == 1


def test_a_buffer_of_all_without_staleness_is_sync():
    sync, buffered = Desk(SYNC, "a", "b"), Desk(CohortSettings("buffered", members=2, buffer=2), "a", "b")
    for desk in (sync, buffered):
        desk.work("a", 1, weight=30)
        desk.work("b", 2, weight=10)
    assert all(map(torch.equal, sync.weights(), buffered.weights()))


def test_nobody_waits_for_a_buffer_to_fill():
    desk = Desk(CohortSettings("buffered", members=2, buffer=3), "a", "b")
    assert desk.work("a", 1).merged.fate is Fate.KEPT
    assert desk.work("a", 2).merged.fate is Fate.KEPT
    assert desk.run.step == 0
    desk.work("b", 3)
    assert desk.run.step == 1


@pytest.mark.parametrize(
    "settings",
    [
        CohortSettings("majority"),
        CohortSettings("sync", members=0),
        CohortSettings("sync", weighting="fame"),
        CohortSettings("quorum", members=2, quorum=3),
        CohortSettings("quorum", members=2, quorum=0),
        CohortSettings("buffered", buffer=0),
    ],
)
def test_settings_that_make_no_round_are_refused(settings):
    with pytest.raises(SettingError):
        require_known(settings)
    require_known(CohortSettings("quorum", members=2, quorum=2))


# ---------------------------------------------------------------- members


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_a_member_goes_where_the_table_says_and_nowhere_else(state, event):
    desk = Desk(SYNC, "a")
    member = desk.member("a")
    member.state = state
    if (state, event) in NEXT:
        assert member.advance(event) is (NEXT[state, event] is not state)
        assert member.state is NEXT[state, event]
    else:
        with pytest.raises(RunLost):
            member.advance(event)


def test_a_name_belongs_to_the_key_that_it_joined_with():
    desk = Desk(SYNC, "a")
    with pytest.raises(AccessDenied, match="another key"):
        desk.cohort.join(b"somebody else", "a")
    with pytest.raises(MessageError, match="is member a"):
        desk.cohort.join(b"a", "b")
    with pytest.raises(MessageError, match="member="):
        desk.cohort.join(b"c", "")
    assert desk.cohort.join(b"a", "a").incarnation == 2


def test_who_comes_back_goes_on_after_its_last_step_and_what_was_half_done_is_gone():
    desk = Desk(SYNC, "a", "b")
    desk.work("a", 1)
    desk.work("b", 2)
    desk.compute("a", 3)
    back = desk.cohort.join(b"a", "a")
    assert (back.incarnation, back.next_step) == (2, 2)
    with pytest.raises(ContributionLost):
        desk.give("a")
    assert desk.give("a", step=1).key.incarnation == 2, "an answer that was lost is still there"


def test_what_a_member_had_offered_before_it_came_back_is_not_counted_twice():
    desk = Desk(SYNC, "a", "b")
    desk.work("a", 1)
    desk.cohort.join(b"a", "a")
    desk.work("a", 1)
    desk.work("b", 2)
    assert desk.run.step == 1
    assert close(desk.moved(), union((1, 1), (2, 1)))


# ---------------------------------------------------------------- answers that wait


def test_nobody_hears_of_a_round_before_it_is_on_the_disk():
    asked = []
    desk = Desk(SYNC, "a", "b", changed=lambda: asked.append(desk.cohort.ledger.count))
    desk.work("a", 1)
    waiting = parked(desk, "a")
    assert desk.work("b", 2) is None
    assert not waiting.done()
    desk.cohort.kept(asked[-1] - 1)
    assert not waiting.done(), "what is kept is from before the round"
    desk.cohort.kept(asked[-1])
    assert waiting.result(0).stepped
    assert desk.give("b", step=1).stepped


def test_a_disk_that_fails_is_told_and_tried_again():
    asked = []
    desk = Desk(CohortSettings("async"), "a", changed=lambda: asked.append(1))
    assert desk.work("a", 1) is None
    member = desk.member("a")
    step = Step(b"", RunStepMessage(member.step_key(1)))
    future = step.wait()
    desk.cohort.park(member, step)
    desk.cohort.not_kept(CheckpointError("the disk is full"))
    assert "the disk is full" in future.result(0).error.message
    before = len(asked)
    assert desk.give("a", step=1) is None
    assert len(asked) == before + 1
    assert desk.run.step == 1, "tried again is not done again"


def test_a_waiting_step_is_answered_before_its_client_gives_up():
    desk = Desk(SYNC, "a", "b")
    desk.work("a", 1)
    waiting = parked(desk, "a", deadline_s=5.0)
    desk.cohort.tick(desk.cohort._parking.due_at)
    error = waiting.result(0).error
    assert isinstance(error, RoundUnfinished)
    assert "waits for b" in error.message
    assert error.retryable


def test_a_restored_cohort_goes_on_where_it_was_kept():
    settings = CohortSettings("buffered", members=2, buffer=3)
    kept, undisturbed = Desk(settings, "a", "b"), Desk(settings, "a", "b")
    for desk in (kept, undisturbed):
        for seed, name in enumerate("abab", 1):
            desk.work(name, seed)
    snapshot = kept.run.snapshot()
    again = Desk(settings)
    again.run.restore(snapshot)
    assert {member.name: member.step for member in again.cohort} == {"a": 2, "b": 2}
    assert again.cohort.join(b"a", "a").incarnation == 2
    for desk in (again, undisturbed):
        desk.work("a", 5)
        desk.work("b", 6)
    assert again.run.step == undisturbed.run.step == 2
    assert all(map(torch.equal, again.weights(), undisturbed.weights()))


def test_the_ledger_says_what_was_merged_with_what_weight():
    desk = Desk(SYNC, "a", "b", changed=lambda: None)
    desk.work("a", 1, weight=30)
    desk.work("b", 2, weight=10)
    lines = desk.cohort.ledger.tail()
    (closed,) = [each for each in read(lines) if isinstance(each, RoundClosed)]
    assert [(part.member, part.weight, part.coefficient) for part in closed.parts] == [
        ("a", 30, 0.75),
        ("b", 10, 0.25),
    ]
    with pytest.raises(CheckpointError, match="line 1"):
        list(read(["{"]))


def test_weights_of_old_gradients_do_not_add_up_to_one():
    assert merge.coefficients([1, 3], [0, 3], 0.5) == [0.25, 0.375]
