"""Kept answers stay within their window and their bytes, the oldest going first."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.engine.answer_window import AnswerWindow
from splitlearn.vocabulary import StepKey
from splitlearn.wire.messages import AnswerMessage

A, B = (b"client", 1), (b"client", 2)


def answer(values: int = 1) -> AnswerMessage:
    return AnswerMessage(StepKey(), torch.zeros(1, 1, values))


def test_the_oldest_answer_of_a_full_window_goes():
    window = AnswerWindow(2, 1000)
    for step in (1, 2, 3):
        window.keep(A, step, answer())
    assert window.get(A, 1) is None
    assert window.get(A, 2) is not None
    assert window.get(A, 3) is not None


def test_the_oldest_answer_over_all_sessions_goes_when_bytes_run_out():
    window = AnswerWindow(10, 12)
    window.keep(A, 1, answer())
    window.keep(B, 1, answer(2))
    window.keep(A, 2, answer())
    assert window.get(A, 1) is None
    assert window.get(B, 1) is not None
    assert window.bytes == 12


def test_an_answer_larger_than_the_budget_is_not_kept():
    window = AnswerWindow(10, 12)
    window.keep(B, 1, answer())
    window.keep(A, 1, answer(4))
    assert window.get(A, 1) is None
    assert window.get(B, 1) is not None, "and pushes nobody else's out"
    assert window.bytes == 4


def test_acknowledged_answers_are_released():
    window = AnswerWindow(10, 1000)
    for step in (1, 2, 3):
        window.keep(A, step, answer())
    window.release(A, 2)
    assert window.get(A, 2) is None
    assert window.get(A, 3) is not None


@given(st.lists(st.tuples(st.sampled_from("kfr"), st.sampled_from([A, B]), st.integers(0, 5)), max_size=40))
def test_bytes_are_those_of_what_is_kept(actions):
    window = AnswerWindow(3, 40)
    steps = {A: 0, B: 0}
    kept: dict = {}
    for what, session, number in actions:
        if what == "k":
            steps[session] += 1
            window.keep(session, steps[session], answer(number))
            kept[session, steps[session]] = 4 * number
        elif what == "f":
            window.forget(session)
        else:
            window.release(session, number)
    assert window.bytes == sum(size for key, size in kept.items() if window.get(*key) is not None) <= 40
