"""Layers compiled for decode steps share their code and give what they gave."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from splitlearn.engine.decode_graphs import DecodeGraph
from splitlearn.engine.graph_rows import GraphShape
from splitlearn.engine.kv_cache import KvCache
from splitlearn.engine.runner import measure_layers
from splitlearn.model import compiled_decode
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.testing.tiny import tiny_model, tiny_whole

pytestmark = pytest.mark.slow
ROWS = 4


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced by torch.compile and run as it is: what inductor makes of it takes half a minute a family."""
    real = torch.compile

    def trace(forward: Any, **_: Any) -> Any:
        return real(forward, backend="eager")

    monkeypatch.setattr(compiled_decode.torch, "compile", trace)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["llama", "gemma3_text", "gpt2", "mixtral"])
def trunk(request: pytest.FixtureRequest, tmp_path: Path) -> TrunkSegment:
    whole = tiny_whole(tiny_model(request.param, tmp_path))
    return TrunkSegment.of_whole(whole, SplitPlan.for_config(whole.config, 1, 1)).eval()


def kv_of(trunk: TrunkSegment) -> KvCache:
    kv = KvCache(
        measure_layers(trunk),
        budget_bytes=8 << 20,
        slot_tokens=32,
        dtype=trunk.dtype,
        device=trunk.device,
        spare=True,
    )
    generator = torch.Generator().manual_seed(0)
    for layer in (*kv.keys_SHLE, *kv.values_SHLE):
        layer.normal_(generator=generator)
    return kv


def step(trunk: TrunkSegment, shape: GraphShape, *, compiled: bool) -> tuple[torch.Tensor, KvCache]:
    kv = kv_of(trunk)
    graph = DecodeGraph(trunk, kv, shape, compiled=compiled)
    graph._asked_R1D.normal_(generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return graph._step().clone(), kv


@pytest.mark.parametrize("standing", [True, False])
def test_a_compiled_step_gives_and_keeps_what_the_family_does(trunk: TrunkSegment, standing: bool) -> None:
    shape = GraphShape(ROWS, 16, standing=standing)
    expected, theirs = step(trunk, shape, compiled=False)
    found, ours = step(trunk, shape, compiled=True)
    assert torch.allclose(found, expected, atol=1e-6)
    # The last column, and the spare slot, hold what rows that are left over have written.
    kept = [(*kv.keys_SHLE, *kv.values_SHLE) for kv in (ours, theirs)]
    for mine, yours in zip(*kept, strict=True):
        assert torch.allclose(mine[:ROWS, :, :16], yours[:ROWS, :, :16], atol=1e-6)
    assert not counters["graph_break"]


def test_layers_and_further_shapes_share_their_code(trunk: TrunkSegment) -> None:
    for rows in (2, 4):
        step(trunk, GraphShape(rows, 16, standing=True), compiled=True)
    made = counters["stats"]["unique_graphs"]
    kinds = len(set(trunk.layer_types))
    assert made < len(trunk.layers) * 2 * kinds
    for rows, columns in ((4, 32), (8, 16), (8, 32)):
        step(trunk, GraphShape(rows, columns, standing=True), compiled=True)
    further = counters["stats"]["unique_graphs"]
    for rows, columns in ((16, 16), (16, 32)):
        step(trunk, GraphShape(rows, columns, standing=True), compiled=True)
    assert counters["stats"]["unique_graphs"] == further


def test_outside_of_a_step_layers_are_as_they_were(trunk: TrunkSegment) -> None:
    step(trunk, GraphShape(ROWS, 16, standing=True), compiled=True)
    assert all("forward" not in vars(layer) for layer in trunk.layers)
