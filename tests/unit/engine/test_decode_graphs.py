"""Which batches run at fixed shapes, and what happens where that goes wrong."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from splitlearn.client import decode_graphs as client_graphs
from splitlearn.client.call_context import Call
from splitlearn.engine import decode_graphs
from splitlearn.testing.pair import Pair, lively_model, served_pair
from splitlearn.testing.parity import batched_greedy, greedy

pytestmark = pytest.mark.slow
IDS = torch.randint(4, 128, (1, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def pair(folder: Path) -> Iterator[Pair]:
    with served_pair(folder, compile="default", client={"compile": "default"}) as pair:
        yield pair


def test_in_steady_state_nothing_is_recorded_any_more(pair: Pair) -> None:
    for check in (greedy, batched_greedy):
        check(pair)
    recorded = pair.engine.graphs.recorded
    assert recorded
    for check in (greedy, batched_greedy):
        assert check(pair).texts_equal
    assert pair.engine.graphs.recorded == recorded


def test_a_forward_that_cannot_be_recorded_runs_as_it_is(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_graphs.DecodeGraph, "__init__", refuse)
    assert greedy(pair).texts_equal
    assert pair.engine.graphs.first_steps.failed
    assert greedy(pair).texts_equal


def test_a_step_that_looks_at_the_wrong_columns_is_noticed_before_it_is_answered(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = decode_graphs.DecodeGraph.run
    monkeypatch.setattr(decode_graphs.DecodeGraph, "run", lambda *args: honest(*args).roll(1, dims=-1))
    found = greedy(pair)
    assert found.texts_equal
    assert found.relative <= 1e-5
    assert pair.engine.graphs.first_steps.failed
    assert not pair.engine.graphs.first_steps.proven


def test_rows_that_fill_a_bucket_up_leave_no_trace(pair: Pair) -> None:
    """Three rows run in a bucket of four: the slots of others are as they were."""
    kv = pair.engine.kv
    before = [layer[: kv.slots].clone() for layer in kv.keys_SHLE]
    ids = IDS.repeat(3, 1)
    text = pair.split.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=0)
    assert text.shape == (3, 10)
    used = {slot for session in pair.engine._sessions._sessions.values() for slot in session.slots}
    for layer, was in zip(kv.keys_SHLE, before, strict=True):
        for slot in set(range(kv.slots)) - used:
            assert torch.equal(layer[slot, :, : kv.slot_tokens], was[slot, :, : kv.slot_tokens])


def test_a_cache_in_use_is_not_given_to_another(pair: Pair) -> None:
    """Two texts by turns: only one can stand on the graph's memory, and both are right."""
    ours = [DynamicCache(config=pair.split.config) for _ in range(2)]
    theirs = [DynamicCache(config=pair.whole.config) for _ in range(2)]
    with torch.no_grad():
        for token in range(IDS.shape[1]):
            for mine, whole, ids in zip(ours, theirs, (IDS, IDS.flip(1)), strict=True):
                step = ids[:, token : token + 1]
                split = pair.split(step, past_key_values=mine, use_cache=True).logits
                expected = pair.whole(step, past_key_values=whole, use_cache=True).logits
                assert torch.allclose(split, expected, atol=1e-5)


@pytest.mark.parametrize("held_rows", [0, 1, 5])
def test_a_row_gives_the_same_text_wherever_its_slot_lies(pair: Pair, held_rows: int) -> None:
    """Alone in the first slot, beside an idle one, and so far off that it is gathered."""
    held = DynamicCache(config=pair.split.config)
    if held_rows:
        with torch.no_grad():
            pair.split(IDS.repeat(held_rows, 1), past_key_values=held, use_cache=True)
    kept = [layer[:held_rows, :, : IDS.shape[1]].clone() for layer in pair.engine.kv.keys_SHLE]
    assert greedy(pair).texts_equal
    assert not pair.engine.graphs.first_steps.failed
    shapes = pair.engine.graphs._graphs
    assert {shape.standing for shape in shapes} == {held_rows < 5}
    for layer, was in zip(pair.engine.kv.keys_SHLE, kept, strict=True):
        assert torch.equal(layer[:held_rows, :, : IDS.shape[1]], was)


def test_layers_that_cannot_be_compiled_run_as_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("there is no C compiler here")

    monkeypatch.setattr(decode_graphs.CompiledDecode, "in_place", refuse)
    with served_pair(folder, compile="max", client={"compile": "off"}) as pair:
        assert greedy(pair).texts_equal
        assert pair.engine.graphs.first_steps.proven
        assert pair.engine.graphs.recorded


def test_a_graph_made_in_inference_mode_serves_calls_outside_of_it(pair: Pair) -> None:
    asked = {
        "attention_mask": torch.ones_like(IDS),
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
    }
    with torch.inference_mode():
        first = pair.split.generate(IDS, **asked)
    steps = pair.split.decode_graphs.steps
    assert steps
    assert torch.equal(pair.split.generate(IDS, **asked), first)
    assert pair.split.decode_graphs.steps > steps


def test_a_wrong_graph_of_the_client_reaches_neither_the_trunk_nor_the_text(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It places every token in the first column: what it sends, and keeps, is wrong."""
    honest = client_graphs.DecodeGraph.place
    monkeypatch.setattr(
        client_graphs.DecodeGraph,
        "place",
        lambda self, ids, column, call: honest(self, ids, 0, Call(None, None, call.cache)),
    )
    found = greedy(pair)
    assert found.texts_equal
    assert found.relative <= 1e-5
    assert pair.split.decode_graphs.first_steps.failed
    assert not pair.split.decode_graphs.first_steps.proven
