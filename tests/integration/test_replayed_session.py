"""A session that replays activations is one like any other, and can go on for ever."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from splitlearn import TrunkServer
from splitlearn.bench.load_worker import Tally, drive
from splitlearn.bench.replayed_session import Replay, ReplayedSession
from splitlearn.client.calls import describe
from splitlearn.errors import SplitMismatch, TrunkUnreachable

WAIT_S = 30.0
PROMPT, TEXT, LEASE_S = 3, 16, 1.0
REPLAY = Replay(PROMPT, TEXT)


@pytest.fixture
def server(model_folder) -> Iterator[TrunkServer]:
    sessions = {"session_tokens": TEXT, "kv_budget_bytes": 1 << 20, "lease_s": LEASE_S}
    with TrunkServer(model_folder, port=0, sessions=sessions) as server:
        yield server


def with_session(server: TrunkServer, do: Callable[[ReplayedSession], Awaitable[None]], **other: int) -> None:
    async def run() -> None:
        facts = describe(server.address, 10)
        for name, value in other.items():
            object.__setattr__(facts, name, value)
        session = ReplayedSession(server.address, facts, REPLAY)
        try:
            await session.open()
            await do(session)
        finally:
            await session.close()

    asyncio.run(run())


def test_it_is_cropped_before_it_outgrows_what_the_server_holds(server):
    async def several_texts(session: ReplayedSession) -> None:
        for _ in range(5 * TEXT):
            answer = await session.step()
            assert answer.activation.shape == [1, 1, server.engine.trunk.hidden_size]
        assert server.engine.open_sessions == 1

    with_session(server, several_texts)


def test_once_closed_it_holds_nothing_on_the_server(server):
    with_session(server, lambda session: session.step())
    until = time.monotonic() + WAIT_S
    while server.engine.open_sessions and time.monotonic() < until:
        time.sleep(0.01)
    assert server.engine.open_sessions == 0


def test_after_a_lost_session_the_load_goes_on_with_another(server):
    async def lose_it(session: ReplayedSession) -> None:
        lost = session.number
        await asyncio.sleep(2 * LEASE_S)
        tally = Tally(time.perf_counter(), 1.0)
        await drive(session, tally)
        told = tally.told()
        assert told["errors"].total() == 1
        assert told["latencies"].total() > 0
        assert session.number != lost

    with_session(server, lose_it)


def test_a_server_that_stops_ends_it_and_is_counted(server):
    async def stop_it(session: ReplayedSession) -> None:
        await asyncio.to_thread(server.stop)
        tally = Tally(time.perf_counter(), 60.0)
        await drive(session, tally)
        assert tally.told()["errors"].total() == 1

    with_session(server, stop_it)


def test_what_the_server_refuses_it_for_is_raised(server):
    with pytest.raises(SplitMismatch):
        with_session(server, lambda session: asyncio.sleep(0), bottom_layers=3)
    server.stop()
    with pytest.raises(TrunkUnreachable):
        with_session(server, lambda session: asyncio.sleep(0))
