"""What leaves for a client over several connections is settled once it has left, and not held longer."""

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable

import pytest

from splitlearn.server.outbox import Exit, Outbox
from splitlearn.wire.chunks import Pieces
from splitlearn.wire.generated import splitlearn_pb2 as pb

CHUNK = 10
SOON_S = 5.0


def pieces(count: int) -> Pieces:
    payload = memoryview(bytes(count * CHUNK - 1))
    return Pieces(pb.ServerMessage, 1, b"x", payload, CHUNK, checksum=True)


def small(session: int) -> pb.ServerMessage:
    return pb.ServerMessage(forked=pb.Forked(session=session))


class Out:
    """An outbox, its stream's own connection, a lane, and how many answers were settled."""

    def __init__(self) -> None:
        self.settled = 0
        self.box = Outbox(self._settle)
        self.own, self.lane = Exit(self.box), Exit(self.box, is_lane=True)

    def _settle(self) -> None:
        self.settled += 1


def running(test: Callable[[Out], Awaitable[None]]) -> Callable[[], None]:
    async def within() -> None:
        await asyncio.wait_for(test(Out()), SOON_S)

    def run() -> None:
        asyncio.run(within())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def idle(connection: Exit) -> "asyncio.Task[pb.ServerMessage | bytes | None]":
    """It asks for more, and there is nothing."""
    asking = asyncio.create_task(connection.take())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not asking.done()
    return asking


@running
async def test_an_answer_is_settled_when_the_last_connection_has_sent_its_pieces(out: Out) -> None:
    out.box.put(pieces(2), is_answer=True)
    assert isinstance(await out.lane.take(), bytes)
    assert isinstance(await out.own.take(), bytes)
    asking = await idle(out.own)
    assert out.settled == 0, "the lane's piece has not left"
    other = await idle(out.lane)
    assert out.settled == 1
    for each in (asking, other):
        each.cancel()


@running
async def test_a_connection_that_is_not_read_holds_what_it_took_and_no_more(out: Out) -> None:
    first = pieces(2)
    out.box.put(first, is_answer=True)
    await out.lane.take()  # and never again
    await out.own.take()
    held = []
    for _ in range(20):
        further = pieces(3)
        held.append(weakref.ref(further))
        out.box.put(further, is_answer=True)
        del further
        for _ in range(3):
            await out.own.take()
    asking = await idle(out.own)
    gc.collect()
    assert not any(each() for each in held)
    assert out.settled == 20, "all but the one that the lane has a piece of"
    asking.cancel()


@running
async def test_a_stream_of_its_own_that_is_not_read_holds_nothing_that_lanes_carried(out: Out) -> None:
    for _ in range(20):
        out.box.put(pieces(3), is_answer=True)
        for _ in range(3):
            await out.lane.take()
    asking = await idle(out.lane)
    assert (out.settled, len(out.box.waiting)) == (20, 0)
    asking.cancel()


@running
async def test_what_is_not_in_pieces_leaves_in_order_on_the_streams_own_connection(out: Out) -> None:
    asking = await idle(out.lane)
    for number in (1, 2, 3):
        out.box.put(small(number), is_answer=True)
    out.box.end()
    assert [(await out.own.take()).forked.session for _ in range(3)] == [1, 2, 3]
    assert out.settled == 2
    assert await out.own.take() is None
    assert out.settled == 3
    asking.cancel()


@running
async def test_a_lane_takes_pieces_behind_what_waits_for_the_streams_own_connection(out: Out) -> None:
    out.box.put(small(1), is_answer=True)
    asking = await idle(out.lane)
    out.box.put(pieces(1), is_answer=True)
    assert isinstance(await asking, bytes)


@running
async def test_a_connection_that_breaks_leaves_nothing_owed(out: Out) -> None:
    out.box.put(pieces(2), is_answer=True)
    await out.lane.take()
    await out.own.take()
    out.lane.leave()
    asking = await idle(out.own)
    assert out.settled == 1
    asking.cancel()


@running
async def test_after_its_end_nothing_is_taken_in_and_all_that_was_leaves(out: Out) -> None:
    out.box.put(pieces(1), is_answer=True)
    out.box.end()
    out.box.put(small(1), is_answer=True)
    assert isinstance(await out.own.take(), bytes)
    assert await out.own.take() is None


@pytest.mark.parametrize("waits", [True, False])
def test_a_lane_that_is_shut_takes_nothing_more(waits: bool) -> None:
    async def within(out: Out) -> None:
        asking = await idle(out.lane) if waits else None
        out.lane.shut()
        out.box.put(pieces(1), is_answer=True)
        assert await (asking or out.lane.take()) is None
        assert isinstance(await out.own.take(), bytes)

    running(within)()
