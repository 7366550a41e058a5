"""What other threads hand over is done by the loop, all of it, in order, and wakes it seldom."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial

from splitlearn.server.handover import Handover

SOON_S = 20


class CountingLoop:
    """A loop that notes how often it is woken, and does nothing until it is told."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.closed = False

    def is_closed(self) -> bool:
        return self.closed

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        self.calls.append(call)


def test_work_that_comes_in_one_go_wakes_the_loop_once():
    loop, done = CountingLoop(), []
    handover = Handover(loop)
    for number in range(32):
        handover.put(lambda number=number: done.append(number))
    assert done == []
    (call,) = loop.calls
    call()
    assert done == list(range(32))
    handover.put(lambda: done.append("next"))
    assert len(loop.calls) == 2, "what comes later wakes it again"


def test_a_thread_that_puts_much_wakes_the_loop_when_it_is_done():
    loop, done = CountingLoop(), []
    handover = Handover(loop)
    with handover.in_one_go():
        for number in range(32):
            handover.put(lambda number=number: done.append(number))
        assert loop.calls == []
        other = threading.Thread(target=handover.put, args=(lambda: done.append("other"),))
        other.start()
        other.join()
        assert len(loop.calls) == 1, "another thread's work does not wait for that"
        loop.calls.pop()()
        assert done == [*range(32), "other"]
    assert loop.calls == [], "nothing is left to be done"
    with handover.in_one_go():
        handover.put(lambda: done.append("last"))
    loop.calls.pop()()
    assert done[-1] == "last"


def test_work_that_fails_keeps_none_behind_it_from_being_done():
    loop, done = CountingLoop(), []
    handover = Handover(loop)

    def fail() -> None:
        raise RuntimeError("this work alone")

    for work in (lambda: done.append("before"), fail, lambda: done.append("after")):
        handover.put(work)
    loop.calls.pop()()
    assert done == ["before", "after"]


def test_a_loop_that_is_closed_is_left_alone():
    loop = CountingLoop()
    loop.closed = True
    Handover(loop).put(lambda: None)
    assert loop.calls == []


def test_nothing_of_many_threads_is_left_behind():
    async def within() -> list[int]:
        loop, done, all_done = asyncio.get_running_loop(), [], asyncio.Event()
        handover = Handover(loop)

        def note(number: int) -> None:
            done.append(number)
            if len(done) == 4000:
                all_done.set()

        def put_all(thread: int) -> None:
            for number in range(1000):
                handover.put(partial(note, 1000 * thread + number))

        threads = [threading.Thread(target=put_all, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(all_done.wait(), SOON_S)
        return done

    done = asyncio.run(within())
    for thread in range(4):
        own = [number for number in done if number // 1000 == thread]
        assert own == sorted(own), "in the order of each"
        assert len(own) == 1000
