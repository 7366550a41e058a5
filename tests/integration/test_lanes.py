"""Large tensors over several connections give the same numbers; a connection that breaks is made anew."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from splitlearn.client import step_stream
from splitlearn.testing.gradients import adapted, furthest, gradients_of_split, gradients_of_whole
from splitlearn.testing.pair import Pair, lively_model, served_pair
from splitlearn.wire import frames
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
