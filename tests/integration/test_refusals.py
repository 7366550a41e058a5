"""What would go wrong is refused with one typed error that says what to do; then everything goes on."""

import copy
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from splitlearn import AutoSplitModelForCausalLM, TrunkServer
from splitlearn.cli.trunk_process import TrunkProcess
from splitlearn.client import grpc_transport
from splitlearn.client.calls import describe
from splitlearn.errors import (
    CorruptFrame,
    KvBudgetExceeded,
    ResourceExhausted,
    SessionExpired,
    SessionLost,
    SessionTooLong,
    SplitLearnError,
    StepTimeout,
    TrunkUnreachable,
    UnsupportedCall,
)
from splitlearn.server import answers
from splitlearn.testing.pair import Pair, lively_model, served_pair

DEADLINE_S = 30.0
IDS = torch.randint(4, 128, (2, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
TEXT: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with served_pair(lively_model(request.param, tmp_path_factory.mktemp("model"))) as pair:
        yield pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model("llama", tmp_path_factory.mktemp("model"))


def read(model: PreTrainedModel, ids_BT: Tensor, cache: DynamicCache | None = None, **how: Any) -> Tensor:
    with torch.no_grad():
        return model(ids_BT, past_key_values=cache, use_cache=cache is not None, **how).logits


def filled(model: PreTrainedModel, **how: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    read(model, IDS, cache, **how)
    return cache


def still_right(pair: Pair) -> bool:
    texts = [model.generate(IDS, attention_mask=MASK, **TEXT) for model in (pair.split, pair.whole)]
    return torch.equal(*texts)


def until(true: Callable[[], bool]) -> bool:
    """Whether it becomes true before the deadline."""
    end = time.monotonic() + DEADLINE_S
    while not true() and time.monotonic() < end:
        gc.collect()  # an error keeps the frames, and with them the caches, that it passed through
        time.sleep(0.01)
    return true()


# ---------------------------------------------------------------- calls that would give a wrong result


def with_a_static_cache(pair: Pair) -> None:
    pair.split.generate(IDS, attention_mask=MASK, cache_implementation="static", **TEXT)


def with_an_offloaded_cache(pair: Pair) -> None:
    cache = DynamicCache(config=pair.split.config)
    cache.offloading = True  # what DynamicCache(offloading=True) sets, where there is a GPU
    read(pair.split, IDS, cache)


def with_a_cache_that_a_whole_model_filled(pair: Pair) -> None:
    read(pair.split, IDS[:, :1], filled(pair.whole))


def with_another_split_models_cache(pair: Pair) -> None:
    other = AutoSplitModelForCausalLM.from_pretrained(
        pair.whole.config.name_or_path, trunk=pair.server.address
    )
    try:
        read(pair.split, IDS[:, :1], filled(other))
    finally:
        other.close()


def by_a_whole_model_with_a_split_models_cache(pair: Pair) -> None:
    read(pair.whole, IDS[:, :1], filled(pair.split))


def with_old_columns_of_the_mask_changed(pair: Pair) -> None:
    padded = MASK.clone()
    padded[1, :3] = 0
    cache = filled(pair.split, attention_mask=padded)
    read(pair.split, IDS[:, :1], cache, attention_mask=torch.ones(2, 13, dtype=torch.long))


def with_old_columns_of_the_mask_taken_away(pair: Pair) -> None:
    padded = torch.ones(2, 13, dtype=torch.long)
    padded[0, 4] = 0
    read(pair.split, IDS[:, :1], filled(pair.split), attention_mask=padded)


def with_a_mask_of_another_length(pair: Pair) -> None:
    padded = torch.ones(2, 15, dtype=torch.long)
    padded[0, 0] = 0
    read(pair.split, IDS[:, :1], filled(pair.split), attention_mask=padded)


def with_a_mask_of_four_dimensions(pair: Pair) -> None:
    read(pair.split, IDS, attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool))


def with_a_mask_for_each_kind_of_layer(pair: Pair) -> None:
    read(pair.split, IDS, attention_mask={"full_attention": None})


def for_the_hidden_states_of_all_layers(pair: Pair) -> None:
    read(pair.split, IDS, output_hidden_states=True)


def for_the_attentions_of_all_layers(pair: Pair) -> None:
    read(pair.split, IDS, output_attentions=True)


def to_be_saved(pair: Pair) -> None:
    pair.split.save_pretrained("nowhere")


def to_be_copied(pair: Pair) -> None:
    copy.deepcopy(pair.split)


def to_be_spread_over_devices(pair: Pair) -> None:
    pair.split._replicate_for_data_parallel()


def for_many_texts_in_pages(pair: Pair) -> None:
    pair.split.generate_batch([[5, 6, 7], [8, 9]])


WRONG = (
    with_a_static_cache,
    with_an_offloaded_cache,
    with_a_cache_that_a_whole_model_filled,
    with_another_split_models_cache,
    by_a_whole_model_with_a_split_models_cache,
    with_old_columns_of_the_mask_changed,
    with_old_columns_of_the_mask_taken_away,
    with_a_mask_of_another_length,
    with_a_mask_of_four_dimensions,
    with_a_mask_for_each_kind_of_layer,
    for_the_hidden_states_of_all_layers,
    for_the_attentions_of_all_layers,
    to_be_saved,
    to_be_copied,
    to_be_spread_over_devices,
    for_many_texts_in_pages,
)


@pytest.mark.parametrize("call", WRONG, ids=lambda call: call.__name__)
def test_a_model_refuses_to_be_used(pair: Pair, call: Callable[[Pair], None]) -> None:
    with pytest.raises(UnsupportedCall) as refused:
        call(pair)
    assert "\n" not in str(refused.value)
    assert still_right(pair)
    assert not Path("nowhere").exists()


def test_what_is_nearly_the_same_is_not_refused(pair: Pair) -> None:
    """Control: padding that stays as it was, and a mask of ones where there was none."""
    padded = MASK.clone()
    padded[1, :3] = 0
    grown = torch.cat([padded, torch.ones(2, 1, dtype=torch.long)], dim=1)
    for first, second in ((padded, grown), (None, torch.ones(2, 13)), (MASK, None)):
        logits = []
        for model in (pair.split, pair.whole):
            cache = filled(model, attention_mask=first)
            logits.append(read(model, IDS[:, :1], cache, attention_mask=second))
        assert torch.equal(*logits)


def test_a_gradient_of_a_model_loaded_to_generate_is_refused(pair: Pair) -> None:
    with pytest.raises(UnsupportedCall, match="lora="):
        pair.split(IDS, labels=IDS).loss.backward()
    assert still_right(pair)


# ---------------------------------------------------------------- texts that are too long


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("tokens", "facts"),
    [
        (300, {"tokens": 300, "max_positions": 256}),
        (100, {"tokens": 100, "session_tokens": 96}),
        (94, {"tokens": 97, "session_tokens": 96}),
    ],
    ids=["the model's positions", "the session", "the session, once it has grown"],
)
def test_a_text_is_too_long_for(pair: Pair, tokens: int, facts: dict[str, int], use_cache: bool) -> None:
    ids = torch.full((1, tokens), 9)
    with pytest.raises(SessionTooLong, match="shorten it") as refused:
        pair.split.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **TEXT)
    assert refused.value.facts == facts
    assert still_right(pair)


def test_a_text_may_fill_its_session_to_the_last_token(pair: Pair) -> None:
    ids = torch.full((1, 96 - 7), 9)
    texts = [
        model.generate(ids, attention_mask=torch.ones_like(ids), **TEXT) for model in (pair.split, pair.whole)
    ]
    assert torch.equal(*texts)


# ---------------------------------------------------------------- room


def test_a_text_that_finds_no_room_is_told_the_figures_and_the_others_go_on(folder: Path) -> None:
    with served_pair(folder) as roomy:
        slot = roomy.engine.kv.slot_bytes
    with served_pair(folder, sessions={"session_tokens": 96, "kv_budget_bytes": 4 * slot}) as pair:
        others = filled(pair.split)
        for how in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
            with pytest.raises(KvBudgetExceeded) as refused:
                pair.split.generate(IDS, attention_mask=MASK, **(TEXT | how))
            wanted = refused.value.facts
            assert wanted["total_bytes"] == 4 * slot
            assert wanted["free_bytes"] < wanted["wanted_bytes"] <= 6 * slot
            assert refused.value.retryable
        assert until(lambda: pair.engine.kv.free_bytes == 2 * slot)
        assert torch.equal(
            read(pair.split, IDS[:, :1], others), read(pair.whole, IDS[:, :1], filled(pair.whole))
        )
        assert still_right(pair)


def test_sessions_beyond_the_limit_are_refused_until_one_ends(folder: Path) -> None:
    with served_pair(folder, sessions={"session_tokens": 96, "max_sessions": 1}) as pair:
        first = filled(pair.split)
        with pytest.raises(ResourceExhausted, match="1 sessions are open"):
            filled(pair.split)
        del first
        assert until(lambda: pair.engine.open_sessions == 0)
        assert still_right(pair)


def test_a_session_that_was_idle_too_long_has_expired_and_says_so(folder: Path) -> None:
    with served_pair(folder, sessions={"session_tokens": 96, "lease_s": 0.5}) as pair:
        cache = filled(pair.split)
        assert until(lambda: pair.engine.open_sessions == 0)
        with pytest.raises(SessionExpired, match="generate again from the prompt"):
            read(pair.split, IDS[:, :1], cache)
        with pytest.raises(SplitLearnError):
            copy.deepcopy(filled_then_expired(pair))
        assert still_right(pair)


def filled_then_expired(pair: Pair) -> DynamicCache:
    cache = filled(pair.split)
    assert until(lambda: pair.engine.open_sessions == 0)
    return cache


def test_a_cache_whose_step_failed_is_not_gone_on_with(folder: Path) -> None:
    """The bottom has the tokens and the trunk has not: the logits would be plausible and wrong."""
    with served_pair(folder) as pair:
        cache = filled(pair.split)
        pair.engine._sessions.drop(next(iter(pair.engine._sessions._sessions.values())))
        with pytest.raises(SessionLost):
            read(pair.split, IDS[:, :1], cache)
        with pytest.raises(UnsupportedCall, match="torn"):
            read(pair.split, IDS[:, :1], cache)
        assert still_right(pair)


# ---------------------------------------------------------------- bytes that change on the way


class Tamper:
    """Changes a byte of the activations that pass, up to so many times."""

    def __init__(self, encode: Callable[..., Any], times: int) -> None:
        self._encode = encode
        self.left = times

    def __call__(self, *args: Any) -> Any:
        proto = self._encode(*args)
        if self.left > 0 and proto.activation.data:
            self.left -= 1
            data = bytearray(proto.activation.data)
            data[7] ^= 64
            proto.activation.data = bytes(data)
        return proto


@pytest.mark.parametrize(
    ("where", "name"),
    [(grpc_transport, "step_to_proto"), (answers, "answer_to_proto")],
    ids=["to the server", "to the client"],
)
def test_bytes_that_change_on_the_way(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, where: Any, name: str
) -> None:
    """... are noticed and sent again; nothing is run twice, and the text is right."""
    tamper = Tamper(getattr(where, name), times=2)
    ran = pair.engine.ran.batches
    with monkeypatch.context() as patch:
        patch.setattr(where, name, tamper)
        assert still_right(pair)
    assert tamper.left == 0
    assert pair.engine.ran.batches == ran + 8

    endless = Tamper(getattr(where, name), times=1000)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, endless)
        with pytest.raises(CorruptFrame):
            still_right(pair)
    assert still_right(pair)


# ---------------------------------------------------------------- a server that dies or hangs


class After:
    """A streamer that does something once so many tokens were made."""

    def __init__(self, tokens: int, act: Callable[[], None]) -> None:
        self._left = tokens
        self._act = act

    def put(self, value: Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            self._act()

    def end(self) -> None:
        pass


def write_on_a_thread(model: PreTrainedModel, **how: Any) -> Any:
    """The text, or what was raised, by the deadline: a hang fails the test."""
    with ThreadPoolExecutor(1) as threads:
        asked = TEXT | {"max_new_tokens": 60, "attention_mask": MASK[:1]} | how
        return threads.submit(model.generate, IDS[:1], **asked).result(DEADLINE_S)


def test_a_server_that_is_killed_in_the_middle_of_a_text_is_unreachable_at_once(folder: Path) -> None:
    with TrunkProcess(folder) as server:
        split = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=server.address)
        split.generation_config.eos_token_id = None
        assert write_on_a_thread(split).shape == (1, 72)
        kill = After(5, lambda: os.kill(server.id, signal.SIGKILL))
        with pytest.raises(TrunkUnreachable, match=r"splitlearn serve|still running"):
            write_on_a_thread(split, streamer=kill)
        # Nor does anything that comes later hang.
        with pytest.raises(TrunkUnreachable):
            write_on_a_thread(split)
        split.close()


def test_a_server_that_hangs_is_given_up_at_the_deadline_and_used_again_after(folder: Path) -> None:
    with TrunkProcess(folder, "--session-tokens", "96") as server:
        split = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=server.address, decode_s=1.0)
        split.generation_config.eos_token_id = None
        before = write_on_a_thread(split)
        stop = After(5, lambda: os.kill(server.id, signal.SIGSTOP))
        try:
            with pytest.raises(StepTimeout, match="within 1 s"):
                write_on_a_thread(split, streamer=stop)
            with pytest.raises(StepTimeout):
                write_on_a_thread(split)
        finally:
            os.kill(server.id, signal.SIGCONT)
        assert torch.equal(write_on_a_thread(split), before)
        # Not even the session that was opened after its client had given up.
        assert until(lambda: describe(server.address, DEADLINE_S).sessions == 0)
        split.close()


def test_a_server_that_stops_lets_a_running_text_finish(folder: Path) -> None:
    with served_pair(folder) as pair:
        stopping = threading.Thread(target=pair.server.stop, daemon=True)
        written = write_on_a_thread(pair.split, streamer=After(5, stopping.start))
        assert torch.equal(written, write_on_a_thread(pair.whole))
        stopping.join(DEADLINE_S)
        assert not stopping.is_alive()
        with pytest.raises(TrunkUnreachable):
            write_on_a_thread(pair.split)


def test_a_server_that_came_back_is_used_again_and_old_caches_are_told_that_they_are_lost(
    folder: Path,
) -> None:
    with served_pair(folder) as pair:
        cache = filled(pair.split)
        port = int(pair.server.address.rpartition(":")[2])
        pair.server.stop()
        with TrunkServer(folder, port=port, device="cpu", sessions={"session_tokens": 96}):
            with pytest.raises((TrunkUnreachable, SessionLost)):
                read(pair.split, IDS[:, :1], cache)
            with pytest.raises(UnsupportedCall, match="torn"):
                read(pair.split, IDS[:, :1], cache)
            assert still_right(pair)
            other = filled(pair.split)
            del cache
            assert torch.equal(
                read(pair.split, IDS[:, :1], other), read(pair.whole, IDS[:, :1], filled(pair.whole))
            )
