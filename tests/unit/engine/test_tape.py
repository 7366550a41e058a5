"""What forwards kept stays within its budget and its lease, the oldest going first."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.engine.tape import Tape, TapeEntry
from splitlearn.engine.trunk_state import BARE
from splitlearn.errors import ResourceExhausted, TapeExpired
from splitlearn.vocabulary import StepKey
from splitlearn.wire.messages import AnswerMessage, RunStepMessage

RUN, OTHER = 7, 9


def entry(size: int = 4, lease_until: float = 10.0) -> TapeEntry:
    return TapeEntry(RunStepMessage(StepKey(run=RUN)), BARE, size, lease_until)


def key(microbatch: int, run: int = RUN) -> tuple[int, int, int]:
    return (run, 1, microbatch)


def filled(budget: int, *sizes: int) -> Tape:
    tape = Tape(budget)
    for microbatch, size in enumerate(sizes):
        tape.put(key(microbatch), entry(size))
    return tape


def held(tape: Tape) -> list[int]:
    return [microbatch for microbatch in range(10) if tape.get(key(microbatch)) is not None]


def test_the_oldest_forwards_go_when_bytes_run_out():
    tape = filled(10, 4, 4, 2)
    tape.put(key(3), entry(6))
    assert held(tape) == [2, 3], "the first two went, and no more than had to"
    assert (tape.bytes, tape.evicted) == (8, 2)


def test_the_budget_may_be_used_to_its_last_byte():
    tape = filled(10, 4, 6)
    assert held(tape) == [0, 1]
    assert (tape.bytes, tape.evicted) == (10, 0)


def test_room_can_be_made_before_a_forward_runs():
    tape = filled(10, 4, 4)
    tape.require_room(3)
    assert held(tape) == [1]


def test_one_forward_that_never_fits_is_refused_with_the_figures_and_pushes_nobody_out():
    tape = filled(10, 4, 4)
    with pytest.raises(ResourceExhausted, match="--tape-budget") as refused:
        tape.put(key(2), entry(11))
    assert refused.value.facts == {"wanted_bytes": 11, "total_bytes": 10}
    assert refused.value.retryable
    assert held(tape) == [0, 1]
    assert (tape.bytes, tape.evicted) == (8, 0)


def test_a_forward_that_was_taken_is_no_longer_there():
    tape = filled(10, 4)
    kept = tape.get(key(0))
    assert tape.take(key(0)) is kept
    assert (len(tape), tape.bytes) == (0, 0)
    with pytest.raises(TapeExpired, match="forward again") as expired:
        tape.take(key(0))
    assert expired.value.retryable


def test_a_forward_that_was_never_there_is_said_to_be_gone():
    with pytest.raises(TapeExpired):
        filled(10, 4).take(key(1))


def test_a_repeated_forward_takes_the_place_of_the_first_and_counts_once():
    tape = filled(10, 4, 6)
    tape.put(key(0), entry(4))
    assert held(tape) == [0, 1]
    assert (tape.bytes, tape.evicted) == (10, 0)
    tape.put(key(2), entry(1))
    assert held(tape) == [0, 2], "and is now the younger one"


def test_a_lease_that_ran_out_lets_go_and_others_stay():
    tape = Tape(100)
    for microbatch, until in enumerate((5.0, 10.0, 4.0)):
        tape.put(key(microbatch), entry(4, until))
    assert tape.expire(5.0) == 1
    assert held(tape) == [0, 1], "a lease holds to its last moment"
    assert tape.expire(20.0) == 2
    assert (len(tape), tape.bytes, tape.evicted) == (0, 0, 3)


def test_a_run_is_forgotten_without_the_others():
    tape = filled(100, 4, 4)
    tape.put(key(0, OTHER), entry(3))
    tape.forget_run(RUN)
    assert (held(tape), len(tape), tape.bytes) == ([], 1, 3)
    assert tape.get(key(0, OTHER)) is not None


def answer(size: int) -> AnswerMessage:
    return AnswerMessage(StepKey(run=RUN), torch.zeros(1, 1, size, dtype=torch.uint8))


def answered(tape: Tape) -> list[int]:
    return [microbatch for microbatch in range(10) if tape.answer(key(microbatch)) is not None]


def test_kept_answers_count_and_the_oldest_go_before_any_forward_does():
    tape = filled(10, 4)
    for microbatch in (1, 2, 3):
        tape.keep_answer(key(microbatch), answer(2))
    assert (answered(tape), tape.bytes) == ([1, 2, 3], 10)
    tape.keep_answer(key(4), answer(2))
    assert (answered(tape), held(tape), tape.bytes) == ([2, 3, 4], [0], 10)
    tape.put(key(5), entry(3))
    assert (answered(tape), held(tape), tape.bytes) == ([4], [0, 5], 9)
    tape.put(key(6), entry(4))
    assert (answered(tape), held(tape), tape.evicted) == ([], [5, 6], 1)


def test_an_answer_without_room_beside_the_forwards_is_not_kept_and_pushes_none_of_them_out():
    tape = filled(10, 4, 4)
    tape.keep_answer(key(2), answer(3))
    assert (answered(tape), held(tape), tape.bytes) == ([], [0, 1], 8)


def test_acknowledged_answers_are_released_and_others_stay():
    tape = Tape(100)
    for microbatch in range(3):
        tape.keep_answer(key(microbatch), answer(2))
    tape.keep_answer(key(0, OTHER), answer(2))
    tape.keep_answer((RUN, 2, 0), answer(2))
    tape.release(RUN, 1, acked_through=2)
    assert (answered(tape), tape.bytes) == ([2], 6)
    assert tape.answer(key(0, OTHER)) is not None
    tape.forget_run(RUN)
    assert (answered(tape), tape.answer((RUN, 2, 0)), tape.bytes) == ([], None, 2)


def test_what_is_let_go_of_is_freed():
    tape, output = filled(10, 4), torch.zeros(4)
    alive = weakref.ref(output)
    tape.get(key(0)).output_BTD = output
    del output
    assert alive() is not None
    tape.put(key(1), entry(10))
    assert alive() is None


SIZES = st.integers(0, 9)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 5), SIZES),
        st.tuples(st.just("keep"), st.integers(6, 9), SIZES),
        st.tuples(st.just("release"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("take"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("room"), st.just(0), SIZES),
        st.tuples(st.just("expire"), st.integers(0, 5), st.just(0)),
    ),
    max_size=30,
)


@given(ACTIONS)
def test_bytes_are_those_of_what_is_kept_and_never_over_the_budget(actions):
    tape = Tape(8)
    for what, number, size in actions:
        try:
            if what == "put":
                tape.put(key(number), entry(size, lease_until=number))
            elif what == "keep":
                tape.keep_answer(key(number), answer(size))
            elif what == "release":
                tape.release(RUN, 1, number)
            elif what == "take":
                tape.take(key(number))
            elif what == "room":
                tape.require_room(size)
                assert tape.bytes + size <= 8
            else:
                tape.expire(number)
        except (ResourceExhausted, TapeExpired):
            pass
        forwards = sum(tape.get(key(each)).bytes for each in held(tape))
        answers = sum(tape.answer(key(each)).activation_BTD.nbytes for each in answered(tape))
        assert tape.bytes == forwards + answers <= 8
        assert len(tape) == len(held(tape))
