"""A decode step at a fixed shape looks at no value: on a GPU it can be recorded."""

from pathlib import Path

import pytest
import torch

from splitlearn.engine.decode_graphs import DecodeGraph
from splitlearn.engine.graph_rows import GraphShape
from splitlearn.engine.kv_cache import KvCache
from splitlearn.engine.runner import measure_layers
from splitlearn.model.looks import CannotBeRecorded, NoLooks
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.testing.tiny import tiny_model, tiny_whole


@pytest.fixture
def trunk(tmp_path: Path) -> TrunkSegment:
    whole = tiny_whole(tiny_model("llama", tmp_path))
    return TrunkSegment.of_whole(whole, SplitPlan.for_config(whole.config, 1, 1)).eval()


def kv_of(trunk: TrunkSegment) -> KvCache:
    layers = measure_layers(trunk)
    return KvCache(
        layers, budget_bytes=1 << 20, slot_tokens=32, dtype=trunk.dtype, device=trunk.device, spare=True
    )


@pytest.mark.parametrize("standing", [True, False])
def test_a_step_looks_at_no_value(trunk: TrunkSegment, standing: bool) -> None:
    graph = DecodeGraph(trunk, kv_of(trunk), GraphShape(2, 32, standing=standing))
    with torch.inference_mode(), NoLooks():
        graph._step()


@pytest.mark.parametrize(
    "look",
    [
        lambda hidden: hidden.sum().item(),
        lambda hidden: bool((hidden > 0).any()),
        lambda hidden: hidden[hidden > 0],
        lambda hidden: torch.tensor([1.0]),
    ],
    ids=["item", "bool", "mask", "from the host"],
)
def test_a_look_is_noticed(trunk: TrunkSegment, look) -> None:
    def hook(module, args, output):
        look(output)

    next(iter(trunk.layers)).register_forward_hook(hook)
    graph = DecodeGraph(trunk, kv_of(trunk), GraphShape(2, 32, standing=True))
    with torch.inference_mode(), NoLooks(), pytest.raises(CannotBeRecorded):
        graph._step()
