"""A session that moves to another server, or waits on the disk, goes on as if it had never been moved."""

import copy
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import DynamicCache

from splitlearn import AutoSplitModelForCausalLM, TrunkServer
from splitlearn.client.calls import open_channel
from splitlearn.client.grpc_errors import error_of
from splitlearn.config import ClientConfig, WireLimits
from splitlearn.errors import (
    AdapterError,
    CorruptFrame,
    FrameError,
    KvBudgetExceeded,
    MessageError,
    ModelMismatch,
    SessionLost,
    SessionTooLong,
    SettingError,
    SplitLearnError,
    SplitMismatch,
    TrunkDraining,
    UnsupportedCall,
)
from splitlearn.testing.pair import SESSION_TOKENS, Pair, lively_model, served_pair
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.generated import splitlearn_pb2_grpc as rpc

DEADLINE_S = 20.0
IDS = torch.randint(4, 128, (2, 12), generator=torch.Generator().manual_seed(1))
OTHER_IDS = torch.randint(4, 128, (2, 12), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0
ONES = torch.ones_like(IDS)
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
LIMITS = WireLimits(chunk_bytes=1 << 10)
"""So small that even a tiny session goes in many parts."""


@dataclass(frozen=True)
class Two:
    """One model on two servers, with a client each."""

    here: Pair
    there: Pair
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "session.safetensors"

    def move(self, cache: DynamicCache) -> DynamicCache:
        self.here.split.export_session(cache, self.file)
        return self.there.split.import_session(self.file)


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3_text", "deepseek_v3"])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    folder = lively_model(request.param, tmp_path_factory.mktemp("model"))
    with served_pair(folder, limits=LIMITS) as here, served_pair(folder, limits=LIMITS) as there:
        yield Two(here, there, tmp_path_factory.mktemp("sessions"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def pair(llama: Path) -> Iterator[Pair]:
    with served_pair(llama, limits=LIMITS) as pair:
        yield pair


def begin(model: Any, ids: Tensor = IDS, tokens: int = 6) -> Any:
    return model.generate(
        ids, attention_mask=MASK, max_new_tokens=tokens, return_dict_in_generate=True, **GREEDY
    )


def go_on(model: Any, ids: Tensor, cache: DynamicCache, tokens: int = 8) -> Tensor:
    mask = torch.cat([MASK, torch.ones(2, ids.shape[1] - MASK.shape[1], dtype=MASK.dtype)], dim=1)
    text: Tensor = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=tokens, **GREEDY
    )
    return text


def logits(model: Any, cache: DynamicCache, rows: tuple[int, ...] = (0, 1)) -> Tensor:
    """Of one more token; `rows` are those of the prompt that the cache's rows come from."""
    length = cache.get_seq_length()
    mask = torch.cat([MASK[list(rows)], torch.ones(len(rows), length + 1 - 12, dtype=MASK.dtype)], dim=1)
    with torch.no_grad():
        answer = model(torch.full((len(rows), 1), 7), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == length + 1
    found: Tensor = answer.logits
    return found


# ---------------------------------------------------------------- as if it had never been moved


def test_a_moved_text_goes_on_as_the_one_that_was_never_interrupted(two: Two) -> None:
    begun = begin(two.here.split)
    cache = two.move(begun.past_key_values)
    sent = two.there.split.trunk.transport.traffic.tensor_bytes
    text = go_on(two.there.split, begun.sequences, cache)
    sent = two.there.split.trunk.transport.traffic.tensor_bytes - sent
    assert torch.equal(text, two.here.whole.generate(IDS, attention_mask=MASK, max_new_tokens=14, **GREEDY))
    assert sent == 2 * 8 * 2 * two.here.whole.config.hidden_size * 4, "only new tokens are sent"


def test_a_cache_of_another_prompt_gives_another_text(two: Two) -> None:
    """Else the text would not depend on what was moved."""
    begun = begin(two.here.split)
    other = two.move(begin(two.here.split, OTHER_IDS).past_key_values)
    text = go_on(two.there.split, begun.sequences, other)
    assert not torch.equal(text, go_on(two.here.split, begun.sequences, begun.past_key_values))


def test_what_was_exported_stays_as_it_was(two: Two) -> None:
    begun = begin(two.here.split)
    two.move(begun.past_key_values)
    text = go_on(two.here.split, begun.sequences, begun.past_key_values)
    assert torch.equal(text, two.here.whole.generate(IDS, attention_mask=MASK, max_new_tokens=14, **GREEDY))


def test_changes_of_rows_that_have_not_been_sent_yet_are_in_the_file(two: Two) -> None:
    cache = begin(two.here.split, tokens=3).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 2]))
    rows = (1, 0, 1)
    assert torch.equal(logits(two.there.split, two.move(cache), rows), logits(two.here.split, cache, rows))


def test_a_crop_that_has_not_been_sent_yet_is_in_the_file(two: Two) -> None:
    caches = []
    for model in (two.here.split, two.here.whole):
        cache = DynamicCache(config=model.config)
        for layer in cache.layers:
            if layer.is_sliding:
                layer.activate_past_recording()
        with torch.no_grad():
            model(
                torch.cat([IDS, IDS], dim=1), past_key_values=cache, attention_mask=torch.cat([MASK, ONES], 1)
            )
        cache.crop(-5)
        caches.append(cache)
    moved = two.move(caches[0])
    assert moved.get_seq_length() == 19
    assert torch.equal(logits(two.there.split, moved), logits(two.here.whole, caches[1]))


def test_beams_and_their_cache_can_be_moved(two: Two) -> None:
    begun = two.here.split.generate(
        IDS, attention_mask=MASK, num_beams=3, max_new_tokens=5, return_dict_in_generate=True, **GREEDY
    )
    cache, rows = begun.past_key_values, (0, 0, 0, 1, 1, 1)
    assert torch.equal(logits(two.there.split, two.move(cache), rows), logits(two.here.split, cache, rows))


def test_a_fork_that_nobody_has_stepped_can_be_moved(two: Two) -> None:
    cache = begin(two.here.split).past_key_values
    fork = copy.deepcopy(cache)
    assert torch.equal(logits(two.there.split, two.move(fork)), logits(two.here.split, cache))


def test_a_moved_text_can_be_moved_back(two: Two) -> None:
    begun = begin(two.here.split)
    there = two.move(begun.past_key_values)
    logits(two.there.split, there)
    two.there.split.export_session(there, two.file)
    back = two.here.split.import_session(two.file)
    assert torch.equal(logits(two.here.split, back), logits(two.there.split, there))


def test_an_imported_session_ends_with_its_cache(two: Two) -> None:
    engine = two.there.engine
    assert until(lambda: engine.open_sessions == 0)
    cache = two.move(begin(two.here.split).past_key_values)
    assert engine.kv.free_bytes == engine.kv.total_bytes - 2 * engine.kv.slot_bytes
    del cache
    assert until(lambda: engine.kv.free_bytes == engine.kv.total_bytes)


def until(true: Callable[[], bool]) -> bool:
    """Whether it becomes true before the deadline."""
    end = time.monotonic() + DEADLINE_S
    while not true() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return true()


def test_a_text_waits_on_the_disk_while_its_server_and_its_client_end(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "session"
    with served_pair(llama) as first:
        begun = begin(first.split)
        first.split.export_session(begun.past_key_values, file)
        expected = first.whole.generate(IDS, attention_mask=MASK, max_new_tokens=14, **GREEDY)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["session"]
    with served_pair(llama) as second:
        text = go_on(second.split, begun.sequences, second.split.import_session(file))
    assert torch.equal(text, expected)


def test_a_client_with_graphs_exports_what_lies_in_their_memory(llama: Path, tmp_path: Path) -> None:
    with served_pair(llama, client={"compile": "default"}, compile="default") as graphed:
        begun = begin(graphed.split)
        assert graphed.split.decode_graphs.steps
        graphed.split.export_session(begun.past_key_values, tmp_path / "session")
        text = go_on(graphed.split, begun.sequences, graphed.split.import_session(tmp_path / "session"))
        assert torch.equal(
            text, graphed.whole.generate(IDS, attention_mask=MASK, max_new_tokens=14, **GREEDY)
        )


def test_a_server_that_stops_lets_sessions_leave_and_none_arrive(llama: Path, tmp_path: Path) -> None:
    with served_pair(llama) as pair:
        cache = begin(pair.split).past_key_values
        pair.engine.drain()
        pair.split.export_session(cache, tmp_path / "session")
        with pytest.raises(TrunkDraining):
            pair.split.import_session(tmp_path / "session")


# ---------------------------------------------------------------- where it does not fit


@pytest.fixture(scope="module")
def file(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "session"
    pair.split.export_session(begin(pair.split).past_key_values, path)
    return path


ELSEWHERE: dict[str, tuple[dict[str, Any], dict[str, Any], type[SplitLearnError]]] = {
    "another cut": ({"bottom_layers": 1}, {"bottom_layers": 1}, SplitMismatch),
    "a trunk of another dtype": ({"dtype": "bfloat16"}, {"dtype": "float32"}, SettingError),
    "a client of another dtype": ({}, {"dtype": "bfloat16"}, SettingError),
    "shorter sessions": ({"sessions": {"session_tokens": 16}}, {}, SessionTooLong),
    "room for one row": (
        {"sessions": {"session_tokens": SESSION_TOKENS, "kv_budget_bytes": SESSION_TOKENS * 256}},
        {},
        KvBudgetExceeded,
    ),
    "an adapter of its own": ({}, {"lora": LoraConfig(r=2), "run": "notes"}, AdapterError),
}


@pytest.mark.parametrize("how", ELSEWHERE)
def test_a_session_is_not_imported_where_it_does_not_fit(llama: Path, file: Path, how: str) -> None:
    server, client, kind = ELSEWHERE[how]
    with TrunkServer(llama, port=0, device="cpu", **server) as there:
        model = AutoSplitModelForCausalLM.from_pretrained(llama, trunk=there.address, **client)
        with pytest.raises(kind):
            model.import_session(file)
        assert there.engine.open_sessions == 0
        assert there.engine.kv.free_bytes == there.engine.kv.total_bytes
        model.close()


def test_a_session_of_another_model_is_refused_by_name(file: Path, tmp_path: Path) -> None:
    with served_pair(lively_model("llama", tmp_path / "model", seed=9)) as other:
        with pytest.raises(ModelMismatch, match=str(file)):
            other.split.import_session(file)
        assert other.engine.open_sessions == 0


def test_a_cache_without_a_text_of_this_model_is_not_exported(
    pair: Pair, llama: Path, tmp_path: Path
) -> None:
    empty = DynamicCache(config=pair.split.config)
    whole = begin(pair.whole).past_key_values
    cropped = begin(pair.split).past_key_values
    cropped.crop(-cropped.get_seq_length())
    for cache in (empty, whole, cropped):
        with pytest.raises(UnsupportedCall):
            pair.split.export_session(cache, tmp_path / "session")
    another = AutoSplitModelForCausalLM.from_pretrained(llama, trunk=pair.server.address)
    with pytest.raises(UnsupportedCall, match="another split model"):
        another.export_session(begin(pair.split).past_key_values, tmp_path / "session")
    another.close()
    assert not list(tmp_path.iterdir())


def test_a_session_with_an_adapter_goes_on_where_that_is_at_its_version(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "session"
    with TrunkServer(llama, port=0, device="cpu") as server:
        model = AutoSplitModelForCausalLM.from_pretrained(
            llama, trunk=server.address, lora=LoraConfig(r=4, lora_alpha=64), run="notes"
        )
        model.generation_config.eos_token_id = None
        train(model)
        model.eval()
        begun = begin(model)
        model.export_session(begun.past_key_values, file)
        expected = model.generate(IDS, attention_mask=MASK, max_new_tokens=14, **GREEDY)
        text = go_on(model, begun.sequences, model.import_session(file))
        assert torch.equal(text, expected)
        bare = AutoSplitModelForCausalLM.from_pretrained(llama, trunk=server.address)
        with pytest.raises(AdapterError, match="notes"):
            bare.import_session(file)
        train(model)
        with pytest.raises(AdapterError, match="version"):
            model.import_session(file)
        for each in (model, bare):
            each.close()


def train(model: Any) -> None:
    """One optimizer step, of the trunk alone."""
    model.train()
    model(IDS, labels=IDS).loss.backward()
    model.trunk.step(learning_rate=0.1)


# ---------------------------------------------------------------- on the wire


class Caller:
    """A client that sends whatever it is told to."""

    def __init__(self, pair: Pair) -> None:
        self.client = pair.split.trunk.transport._client
        self._address = pair.server.address

    def export(self, session: int, client: bytes | None = None) -> list[pb.SessionPart]:
        request = pb.ExportSessionRequest(session=session, client=self.client if client is None else client)
        with open_channel(self._address, ClientConfig()) as channel:
            try:
                return list(rpc.TrunkStub(channel).ExportSession(request, timeout=DEADLINE_S))
            except grpc.RpcError as error:
                raise error_of(error, self._address) from None

    def bring(self, parts: list[pb.SessionPart], session: int = 5) -> pb.ImportSessionReply:
        parts[0].session, parts[0].client = session, self.client
        with open_channel(self._address, ClientConfig()) as channel:
            try:
                return rpc.TrunkStub(channel).ImportSession(iter(parts), timeout=DEADLINE_S)
            except grpc.RpcError as error:
                raise error_of(error, self._address) from None


@pytest.fixture(scope="module")
def caller(pair: Pair) -> Caller:
    return Caller(pair)


@pytest.fixture
def session(pair: Pair) -> Iterator[int]:
    cache = begin(pair.split).past_key_values
    yield cache.layers[2].session._number
    del cache


def test_parts_are_of_bounded_size_and_say_all_once(pair: Pair, caller: Caller, session: int) -> None:
    parts = caller.export(session)
    assert max(part.ByteSize() for part in parts) < LIMITS.chunk_bytes + 256
    held = sum(len(part.keys.data) + len(part.values.data) for part in parts)
    assert held == 2 * 17 * pair.engine.kv.token_bytes
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]


def test_a_session_is_exported_to_its_own_client_only(caller: Caller, session: int) -> None:
    with pytest.raises(SessionLost):
        caller.export(session, b"x" * 16)
    with pytest.raises(MessageError):
        caller.export(session, b"x")
    with pytest.raises(SessionLost):
        caller.export(session + 2)


def swapped(parts: list[pb.SessionPart]) -> None:
    parts[2], parts[3] = parts[3], parts[2]


def left_out(parts: list[pb.SessionPart]) -> None:
    del parts[3]


def cut_short(parts: list[pb.SessionPart]) -> None:
    del parts[-1]


def said_to_be_last(parts: list[pb.SessionPart]) -> None:
    parts[2].last = True


def changed(parts: list[pb.SessionPart]) -> None:
    data = bytearray(parts[2].keys.data)
    data[0] ^= 1
    parts[2].keys.data = bytes(data)


def of_another_shape(parts: list[pb.SessionPart]) -> None:
    for frame in (parts[1].keys, parts[1].values):
        frame.shape[1], frame.shape[3] = frame.shape[3], frame.shape[1]


def of_no_shape(parts: list[pb.SessionPart]) -> None:
    parts[1].keys.ClearField("shape")


def of_too_many_rows(parts: list[pb.SessionPart]) -> None:
    parts[0].rows = 1 << 31


def of_no_tokens(parts: list[pb.SessionPart]) -> None:
    parts[0].length = 0


def without_a_model(parts: list[pb.SessionPart]) -> None:
    parts[0].ClearField("fingerprint")


WRONG = {
    swapped: MessageError,
    left_out: MessageError,
    cut_short: MessageError,
    said_to_be_last: MessageError,
    changed: CorruptFrame,
    of_another_shape: FrameError,
    of_no_shape: FrameError,
    of_too_many_rows: MessageError,
    of_no_tokens: MessageError,
    without_a_model: ModelMismatch,
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_parts_that_are_wrong_are_refused_and_leave_nothing(
    pair: Pair, caller: Caller, session: int, wrong: Any
) -> None:
    parts = caller.export(session)
    assert until(lambda: pair.engine.open_sessions == 1)
    wrong(parts)
    with pytest.raises(WRONG[wrong]):
        caller.bring(parts)
    assert until(lambda: pair.engine.open_sessions == 1)


def test_a_session_that_is_open_is_not_imported_over(pair: Pair, caller: Caller, session: int) -> None:
    with pytest.raises(MessageError, match="open already"):
        caller.bring(caller.export(session), session)
    assert caller.export(session)
