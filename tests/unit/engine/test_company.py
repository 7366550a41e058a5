"""A batch waits for sessions that come back soon, for less than a batch takes, and for nobody else."""

import pytest
import torch

from splitlearn.engine.company import BATCHES_AWAY, Company
from splitlearn.engine.ready_step import ReadyStep
from splitlearn.engine.session import Session
from splitlearn.engine.step import Step
from splitlearn.vocabulary import Precision, StepKey
from splitlearn.wire.messages import StepMessage

BATCH_S = 8.0
SOON_S = BATCH_S / 8
LATE_S = BATCHES_AWAY * BATCH_S


class Times:
    """A company, its sessions, and the time: batches take `BATCH_S`, sessions as long as they are told."""

    def __init__(self, wait_ms: float | None = None) -> None:
        self.company = Company(wait_ms)
        self.now = 100.0

    def step(self, session: Session, pause_s: float) -> ReadyStep:
        """It comes so long after now."""
        message = StepMessage(StepKey(session=session.id[1], step=1), torch.zeros(1, 1, 1))
        member = ReadyStep(Step(b"me", message, self.now + pause_s), session)
        self.company.came(member)
        return member

    def run(self, *members: ReadyStep, took_s: float = BATCH_S) -> None:
        began = max((member.step.arrived_at for member in members), default=self.now)
        self.now = began + took_s
        self.company.ran(members, began, self.now)

    def rounds(self, *sessions: Session, pause_s: float, number: int = 2) -> None:
        for _ in range(number):
            self.run(*(self.step(session, pause_s) for session in sessions))

    def awaited(self, after_s: float = 0.0, ready: int = 1, room: int = 64) -> int:
        found = self.company.awaited(self.now + after_s, ready, room, lambda session: True)
        return 0 if found is None else found.sessions


def session(number: int) -> Session:
    return Session((b"me", number), 0, Precision(), (number,), 0.0)


@pytest.fixture
def times() -> Times:
    return Times()


def test_sessions_that_come_back_soon_are_awaited(times):
    me, you = session(1), session(2)
    times.rounds(me, you, pause_s=SOON_S)
    assert times.awaited() == 2
    times.step(me, SOON_S)
    found = times.company.awaited(times.now + SOON_S, ready=1, room=64, joins=lambda session: True)
    assert found.sessions == 1
    assert found.within_s == pytest.approx(BATCH_S / 2)


@pytest.mark.parametrize("ready", [1, 7, 31])
def test_who_is_overdue_is_given_up_when_the_wait_has_cost_what_it_could_save(times, ready):
    me, you = session(1), session(2)
    times.rounds(me, you, pause_s=SOON_S)
    times.step(me, SOON_S)
    bound_s = SOON_S + BATCH_S / (ready + 1)
    assert times.awaited(after_s=SOON_S + 0.9 * (bound_s - SOON_S), ready=ready) == 1
    assert times.awaited(after_s=bound_s, ready=ready) == 0


def test_many_do_not_wait_for_one_that_went_astray(times):
    """It has come late once; the others would pay for it together."""
    those = [session(number) for number in range(32)]
    times.rounds(*those, pause_s=SOON_S)
    for each in those[1:]:
        times.step(each, SOON_S)
    found = times.company.awaited(times.now + SOON_S, ready=31, room=64, joins=lambda session: True)
    assert found.within_s == pytest.approx(BATCH_S / 32)


@pytest.mark.parametrize(("ready", "awaited"), [(1, 1), (2, 1), (4, 0), (40, 0)])
def test_nobody_is_awaited_where_that_costs_more_than_it_saves(times, ready, awaited):
    """One session, due in a quarter of a batch, is saved a batch; it and each that is ready pay a quarter."""
    times.rounds(session(1), pause_s=BATCH_S / 4)
    assert times.awaited(ready=ready) == awaited


def test_of_many_as_many_are_awaited_as_save_most(times):
    """The slower half would come, but all others would wait too long for it."""
    soon, later = [session(number) for number in range(8)], [session(number) for number in range(8, 16)]
    for _ in range(2):
        times.run(
            *(times.step(each, SOON_S / 4) for each in soon),
            *(times.step(each, BATCH_S / 2) for each in later),
        )
    assert times.awaited(ready=8) == 8


@pytest.mark.parametrize("wait_ms", [None, 1000 * BATCH_S])
def test_nobody_is_awaited_for_whom_the_batch_has_no_room(wait_ms):
    times = Times(wait_ms)
    those = [session(number) for number in range(8)]
    times.rounds(*those, pause_s=SOON_S)
    assert times.awaited(room=8) == 8
    assert times.awaited(room=3) == 3
    assert times.awaited(room=0) == 0


def test_one_session_alone_never_waits(times):
    me = session(1)
    for _ in range(5):
        member = times.step(me, SOON_S)
        assert times.awaited(after_s=SOON_S) == 0
        times.run(member)


def test_idle_sessions_are_not_awaited(times):
    me, idle = session(1), session(2)
    times.rounds(me, idle, pause_s=SOON_S)
    times.rounds(me, pause_s=SOON_S, number=1)
    times.step(me, SOON_S)
    assert times.awaited(after_s=SOON_S) == 0


def test_who_was_slow_is_awaited_only_once_it_is_quick_again(times):
    near, far = session(1), session(2)
    times.rounds(near, far, pause_s=SOON_S)
    times.rounds(near, far, pause_s=LATE_S, number=1)
    assert times.awaited() == 0
    times.rounds(near, far, pause_s=SOON_S, number=1)
    assert times.awaited() == 2


def test_a_session_that_is_new_is_not_awaited(times):
    times.rounds(session(1), pause_s=SOON_S, number=1)
    assert times.awaited() == 0


def test_a_batch_that_stalled_makes_nobody_wait_longer(times):
    me, you = session(1), session(2)
    times.rounds(me, you, pause_s=SOON_S)
    times.run(times.step(me, SOON_S), times.step(you, SOON_S), took_s=1000 * BATCH_S)
    assert times.awaited(after_s=SOON_S + BATCH_S * 2 / 3) == 0


def test_a_told_time_stands_whatever_batches_take():
    me, you = session(1), session(2)
    times = Times(wait_ms=3 * LATE_S * 1000)
    times.rounds(me, you, pause_s=LATE_S, number=3)
    assert times.awaited(after_s=2 * LATE_S) == 2
    assert times.awaited(after_s=3 * LATE_S) == 0


def test_a_told_time_of_0_waits_for_nobody():
    times = Times(wait_ms=0)
    times.rounds(session(1), session(2), pause_s=0.0, number=4)
    assert times.awaited() == 0


def test_who_is_gone_is_forgotten(times):
    for number in range(100):
        times.rounds(session(number), pause_s=SOON_S)
    assert len(times.company._away) <= 1


def test_who_cannot_join_is_not_awaited(times):
    near, other = session(1), session(2)
    times.rounds(near, other, pause_s=SOON_S)
    assert times.company.awaited(times.now, 1, 64, joins=lambda each: each is near).sessions == 1
    assert times.company.awaited(times.now, 1, 64, joins=lambda each: False) is None
