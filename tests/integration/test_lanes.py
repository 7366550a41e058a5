"""Large tensors over several connections give the same numbers; a connection that breaks is made anew."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from peft import LoraConfig

from splitlearn.client import step_stream
from splitlearn.config import ClientConfig
from splitlearn.errors import StepTimeout
from splitlearn.server import lanes as lanes_of_server
from splitlearn.testing.gradients import adapted, furthest, gradients_of_split, gradients_of_whole
from splitlearn.testing.pair import Pair, lively_model, served_pair
from splitlearn.vocabulary import StepKey
from splitlearn.wire import frames
from splitlearn.wire.checksum import checksum_of
from splitlearn.wire.chunks import CHUNK_OF, Pieces
from splitlearn.wire.generated import splitlearn_pb2 as pb

DEADLINE_S = 30.0
IDS = torch.randint(4, 128, (2, 12), generator=torch.Generator().manual_seed(1))
LORA = LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "APART_BYTES", 1)
    monkeypatch.setattr(step_stream, "LANES_FROM_BYTES", 1)


SERVER: dict[str, Any] = {"limits": {"chunk_bytes": 200, "lanes": 3}}


@pytest.fixture
def pair(folder: Path, small_is_large: None) -> Iterator[Pair]:
    with served_pair(folder, **SERVER) as pair:
        yield pair


def lanes(pair: Pair) -> list[int]:
    """How many further connections each stream has that has any."""
    return [len(stream.lanes) for stream in pair.server._hall.streams if stream.lanes]


def same_logits(pair: Pair) -> bool:
    with torch.no_grad():
        return torch.equal(pair.split(IDS).logits, pair.whole(IDS).logits)


def test_gradients_over_lanes_are_the_whole_models(pair: Pair) -> None:
    adapted(pair.whole, pair.split, pair.engine, LORA)
    for model in (pair.whole, pair.split):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert furthest(gradients_of_split(pair.split, pair.engine), gradients_of_whole(pair.whole)) == 0
    assert lanes(pair) == [2]


def test_a_server_that_allows_one_connection_is_sent_all_over_that(
    folder: Path, small_is_large: None
) -> None:
    with served_pair(folder, limits={"chunk_bytes": 200, "lanes": 1}) as pair:
        assert same_logits(pair)
        assert lanes(pair) == []


def test_without_room_for_lanes_the_stream_goes_on_alone(folder: Path, small_is_large: None) -> None:
    with served_pair(folder, max_streams=2, **SERVER) as pair:
        assert same_logits(pair)
        assert lanes(pair) == []


def test_small_tensors_open_no_lanes(folder: Path) -> None:
    with served_pair(folder, **SERVER) as pair:
        assert same_logits(pair)
        assert lanes(pair) == []


def test_after_a_lane_broke_the_next_step_is_right_over_new_ones(pair: Pair) -> None:
    assert same_logits(pair)
    (stream,) = (stream for stream in pair.split.trunk.transport._streams.values() if len(stream._lanes) > 1)
    stream._lanes[1].cancel()
    until = time.monotonic() + DEADLINE_S
    while not stream.is_broken and time.monotonic() < until:
        time.sleep(0.01)
    assert stream.is_broken
    assert same_logits(pair)
    assert lanes(pair) == [2]


def bulk(pair: Pair) -> Any:
    """The stream that has lanes."""
    return next(stream for stream in pair.split.trunk.transport._streams.values() if len(stream._lanes) > 1)


def until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + DEADLINE_S
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def noted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The client's lanes from now on, as they are made."""
    made, begin = [], step_stream.Lane.__init__

    def init(lane: Any, *args: Any) -> None:
        begin(lane, *args)
        made.append(lane)

    monkeypatch.setattr(step_stream.Lane, "__init__", init)
    return made


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """With further lanes, not with the stream itself."""
    honest = step_stream.Lane.greet

    def greet(lane: Any, hello: pb.Hello, timeout_s: float) -> pb.Welcome:
        return honest(lane, hello, 0.5 if hello.lane_of else timeout_s)

    monkeypatch.setattr(step_stream.Lane, "greet", greet)


def test_a_lane_whose_welcome_is_late_is_done_without_and_ends_in_order(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, made, warned = threading.Event(), noted(monkeypatch), []
    honest = lanes_of_server.Lane.messages

    async def slow(lane: Any, requests: Any) -> AsyncIterator[Any]:
        lane._stream.lanes.add(lane)
        while not late.is_set():
            await asyncio.sleep(0.01)
        async for message in honest(lane, requests):
            yield message

    monkeypatch.setattr(lanes_of_server.Lane, "messages", slow)
    monkeypatch.setattr(step_stream.log, "warning", lambda event, **facts: warned.append(facts))
    impatient(monkeypatch)
    assert same_logits(pair)
    *_, lane = made
    stream = bulk(pair)
    assert [each["reason"] for each in warned if each["reason"]]
    late.set()
    assert until(lambda: not lane._reader.is_alive())
    assert lane.ended_in_order
    assert until(lambda: lanes(pair) == [])
    assert same_logits(pair)
    assert not stream.is_broken
    assert stream._lanes == stream._lanes[:1]


def test_a_lane_whose_welcome_never_comes_ends_with_its_stream(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = noted(monkeypatch)

    async def mute(lane: Any, requests: Any) -> AsyncIterator[Any]:
        await asyncio.sleep(3600)
        yield pb.ServerMessage()

    monkeypatch.setattr(lanes_of_server.Lane, "messages", mute)
    impatient(monkeypatch)
    assert same_logits(pair)
    *_, lane = made
    assert lane._reader.is_alive()
    pair.split.close()
    assert until(lambda: not lane._reader.is_alive())


def test_a_close_that_overtakes_the_opening_of_its_session_closes_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of the opening is held up on a lane until its caller has given up."""
    holding, held, given_up = threading.Event(), threading.Event(), threading.Event()
    honest = step_stream.Lane._requests
    further: list[Any] = []

    def requests(lane: Any) -> Iterator[Any]:
        for each in honest(lane):
            if holding.is_set() and isinstance(each, bytes):
                if lane in further:
                    held.set()
                    given_up.wait(DEADLINE_S)
                else:
                    held.wait(DEADLINE_S)
            yield each

    monkeypatch.setattr(step_stream.Lane, "_requests", requests)
    assert same_logits(pair)
    further.append(bulk(pair)._lanes[1])
    answers: SimpleQueue[Any] = SimpleQueue()
    submit = pair.engine.submit

    def submitted(*step: Any) -> Any:
        answers.put(answer := submit(*step))
        return answer

    monkeypatch.setattr(pair.engine, "submit", submitted)
    pair.split.trunk._plain_steps._config = ClientConfig(decode_s=1.0)
    holding.set()
    with pytest.raises(StepTimeout, match="decode_s, prefill_s"), torch.no_grad():
        pair.split(IDS, use_cache=True)
    assert answers.empty(), "the opening is behind the first of the closes"
    given_up.set()
    answers.get(timeout=DEADLINE_S).result(DEADLINE_S)
    assert until(lambda: pair.engine.open_sessions == 0)
    assert not bulk(pair).is_broken


def test_a_training_step_that_is_late_names_its_own_deadline(pair: Pair) -> None:
    stream = pair.split.trunk.transport._stream("bulk")
    step = pb.ClientMessage(chunk=pb.Chunk(number=1, data=b"x", total_bytes=9, checksum=checksum_of(b"x")))
    with pytest.raises(StepTimeout, match="train_s"):
        stream._ask(StepKey(run=1, step=1), step, 0.1)


@pytest.mark.parametrize("is_head", [True, False], ids=["of the message", "of the tensor"])
@pytest.mark.parametrize("kind", [pb.ClientMessage, pb.ServerMessage], ids=["to the server", "to the client"])
def test_a_piece_that_changed_on_its_way_is_asked_for_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, kind: Any, is_head: bool
) -> None:
    left, honest = [1, 2], Pieces._piece

    def tamper(pieces: Pieces, start: int, stop: int) -> bytes:
        made = bytearray(honest(pieces, start, stop))
        if left and pieces._chunk_of == CHUNK_OF[kind] and (start == 0) == is_head:
            left.pop()
            made[-1] ^= 64
        return bytes(made)

    monkeypatch.setattr(Pieces, "_piece", tamper)
    assert same_logits(pair)
    assert not left
