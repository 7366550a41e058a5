"""Who waits on the queue is woken when enough is in it, or by its end, and finds all in order."""

import threading

import pytest
import torch

from splitlearn.engine.step import Step
from splitlearn.engine.step_queue import StepQueue
from splitlearn.vocabulary import StepKey
from splitlearn.wire.messages import StepMessage

WAIT_S = 20


def waiting(queue: StepQueue, wanted: int) -> tuple[threading.Thread, list[int]]:
    """Someone who waits for so many, and how many were there each time it woke."""
    found: list[int] = []

    def wait() -> None:
        queue.wait(WAIT_S, wanted)
        found.append(len(queue.take()))

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, found


def request() -> None:
    """Nothing to do."""


def step(tokens: int = 1) -> Step[StepMessage]:
    return Step(b"me", StepMessage(StepKey(session=1, step=1), torch.zeros(1, tokens, 1)))


def test_one_wakes_who_waits_for_any():
    queue = StepQueue()
    thread, found = waiting(queue, 1)
    queue.put(request)
    thread.join(WAIT_S)
    assert found == [1]


def test_fewer_than_are_wanted_wake_nobody():
    queue = StepQueue()
    thread, found = waiting(queue, 3)
    for _ in range(2):
        queue.put(step())
    assert found == []
    queue.put(step())
    thread.join(WAIT_S)
    assert found == [3]


def test_the_end_wakes_who_waits_for_more():
    queue = StepQueue()
    thread, found = waiting(queue, 3)
    queue.put(step())
    queue.shut()
    thread.join(WAIT_S)
    assert found == [1]
    assert not queue.put(request)


@pytest.mark.parametrize("item", [request, step(tokens=100)], ids=["a request", "a prompt"])
def test_what_is_no_decode_step_wakes_at_once(item):
    queue = StepQueue()
    thread, found = waiting(queue, 3)
    queue.put(step())
    queue.put(item)
    thread.join(WAIT_S)
    assert found == [2]
