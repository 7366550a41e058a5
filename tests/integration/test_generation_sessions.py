"""Sessions on the server live as long as their caches; what crosses the wire is what was agreed on."""

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import DynamicCache

from splitlearn import AutoSplitModelForCausalLM, TrunkServer
from splitlearn.testing.pair import Pair, lively_model, served_pair
from splitlearn.testing.parity import distance, read_in_pieces
from splitlearn.testing.tiny import tiny_whole
from splitlearn.vocabulary import StepKey
from splitlearn.wire.messages import OpenSession, StepMessage

DEADLINE_S = 30.0
IDS = torch.randint(4, 128, (2, 12), generator=torch.Generator().manual_seed(1))
STEPS = (8, 1, 1, 2)
TEXT: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Pair]:
    with served_pair(folder) as pair:
        yield pair


def until(true: Callable[[], bool]) -> bool:
    """Whether it becomes true before the deadline."""
    end = time.monotonic() + DEADLINE_S
    while not true() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return true()


def used_bytes(pair: Pair) -> int:
    return pair.engine.kv.total_bytes - pair.engine.kv.free_bytes


def prompt(pair: Pair) -> DynamicCache:
    cache = DynamicCache(config=pair.split.config)
    with torch.no_grad():
        pair.split(IDS, past_key_values=cache, use_cache=True)
    return cache


# ---------------------------------------------------------------- how long a session lives


def test_a_session_lives_as_long_as_its_cache(pair: Pair) -> None:
    caches = [prompt(pair) for _ in range(3)]
    assert pair.engine.open_sessions == 3
    assert used_bytes(pair) == 6 * pair.engine.kv.slot_bytes
    caches.pop()
    assert until(lambda: pair.engine.open_sessions == 2)
    caches.clear()
    assert until(lambda: pair.engine.open_sessions == 0)
    assert used_bytes(pair) == 0


def test_texts_of_all_kinds_leave_no_session_behind(pair: Pair) -> None:
    mask = torch.ones_like(IDS)
    for how in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"use_cache": False}):
        pair.split.generate(IDS, attention_mask=mask, **(TEXT | how))
    pair.split.generate(IDS[:1], attention_mask=mask[:1], prompt_lookup_num_tokens=2, **TEXT)
    assert until(lambda: pair.engine.open_sessions == 0)
    assert used_bytes(pair) == 0


def test_a_reset_cache_closes_its_old_session(pair: Pair) -> None:
    cache = prompt(pair)
    cache.reset()
    assert until(lambda: pair.engine.open_sessions == 0)
    with torch.no_grad():
        pair.split(IDS[:1], past_key_values=cache, use_cache=True)
    assert pair.engine.open_sessions == 1


def test_beams_give_back_the_rows_that_they_took(pair: Pair) -> None:
    written = pair.split.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        num_beams=3,
        num_return_sequences=1,
        return_dict_in_generate=True,
        **TEXT,
    )
    assert used_bytes(pair) == 6 * pair.engine.kv.slot_bytes
    written.past_key_values.batch_select_indices(torch.tensor([0, 3]))
    with torch.no_grad():
        pair.split(IDS[:, :1], past_key_values=written.past_key_values, use_cache=True)
    assert used_bytes(pair) == 2 * pair.engine.kv.slot_bytes


def test_a_model_that_is_closed_frees_what_its_caches_held(folder: Path, pair: Pair) -> None:
    with torch.no_grad():
        split = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=pair.server.address)
        cache = DynamicCache(config=split.config)
        split(IDS, past_key_values=cache, use_cache=True)
    assert pair.engine.open_sessions == 1
    split.close()
    assert until(lambda: pair.engine.open_sessions == 0)


LEAVES = """
import sys, torch
from transformers import DynamicCache
from splitlearn import AutoSplitModelForCausalLM
model = AutoSplitModelForCausalLM.from_pretrained(sys.argv[1], trunk=sys.argv[2])
cache = DynamicCache(config=model.config)
model(torch.tensor([[5, 6, 7]]), past_key_values=cache, use_cache=True)
print("said")
"""


def test_a_client_that_ends_leaves_no_session_behind(folder: Path, pair: Pair) -> None:
    opened = pair.engine.ran.batches
    command = [sys.executable, "-c", LEAVES, str(folder), pair.server.address]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE_S)
    assert (ended.returncode, ended.stdout) == (0, "said\n"), ended.stderr
    assert pair.engine.ran.batches == opened + 1
    assert until(lambda: pair.engine.open_sessions == 0)


def test_a_large_kv_budget_takes_no_memory_before_sessions_do(folder: Path) -> None:
    """Otherwise the default budget of gigabytes would be written to, and taken, at every start."""
    budget = 2 << 30
    before = psutil.Process().memory_info().rss
    with TrunkServer(folder, port=0, device="cpu", sessions={"kv_budget_bytes": budget}) as server:
        taken = psutil.Process().memory_info().rss - before
        assert server.engine.kv.total_bytes > budget // 2
    assert taken < budget // 8


# ---------------------------------------------------------------- steps on the transport


def test_a_step_that_the_transport_asks_twice_is_run_once(pair: Pair) -> None:
    transport = pair.split.trunk.transport
    activation = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    opening = StepMessage(StepKey(session=11, step=1), activation, open=OpenSession(), deadline_s=DEADLINE_S)
    ran = pair.engine.ran.batches
    first, again = (transport.step(opening).activation_BTD for _ in range(2))
    assert torch.equal(first, again)
    assert pair.engine.ran.batches == ran + 1
    following = StepMessage(StepKey(session=11, step=2), activation[:, :1], deadline_s=DEADLINE_S)
    assert transport.step(following).activation_BTD.shape == (1, 1, 32)
    assert pair.engine.ran.batches == ran + 2


# ---------------------------------------------------------------- precision


def test_a_bfloat16_wire_halves_the_bytes_and_moves_the_logits_little(folder: Path, pair: Pair) -> None:
    half = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=pair.server.address, codec="half")
    sent = []
    for model in (pair.split, half):
        traffic = model.trunk.transport.traffic
        before = traffic.tensor_bytes
        read_in_pieces(model, IDS[:1], STEPS)
        sent.append(traffic.tensor_bytes - before)
    assert sent[0] == 2 * sent[1] == 2 * 12 * 32 * 4
    apart = distance(read_in_pieces(pair.whole, IDS[:1], STEPS), read_in_pieces(half, IDS[:1], STEPS))
    assert 0 < apart.relative < 0.05
    half.close()


def test_a_model_in_bfloat16_gives_the_whole_models_logits_and_text(folder: Path) -> None:
    with served_pair(folder, dtype="bfloat16") as pair:
        assert pair.engine.trunk.dtype == torch.bfloat16
        whole, split = (read_in_pieces(model, IDS[:1], STEPS) for model in (pair.whole, pair.split))
        assert split.dtype == torch.bfloat16
        assert torch.equal(whole, split)
        mask = torch.ones_like(IDS)
        texts = [model.generate(IDS, attention_mask=mask, **TEXT) for model in (pair.whole, pair.split)]
        assert torch.equal(*texts)


def test_a_float32_client_of_a_bfloat16_trunk_is_close_to_the_whole_model(folder: Path) -> None:
    with TrunkServer(folder, port=0, device="cpu", dtype="bfloat16") as server:
        split = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=server.address, dtype="float32")
        logits = [read_in_pieces(model, IDS[:1], STEPS) for model in (tiny_whole(folder), split)]
        split.close()
    assert logits[1].dtype == torch.float32
    assert 0 < distance(*logits).relative < 0.1
