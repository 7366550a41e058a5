"""Decode steps at fixed shapes, on both sides of the cut, give the whole model's texts."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache

from splitlearn.model.looks import CannotBeRecorded, NoLooks
from splitlearn.testing.pair import Pair, lively_model, served_pair
from splitlearn.testing.parity import ALONE, BATCHED
from splitlearn.testing.tiny import PROVEN

CLOSE = 5e-5
"""These models are lively: the whole one is 5e-6 from itself in float64; what the bottom rounds grows on."""
CHECKS = ALONE | BATCHED
LOOK = ("falcon",)
"""Families that index with a list, which is brought from the host: on a GPU their steps are their own."""
NAMES = ("beams", "prompt_lookup", "batched_logits")


@pytest.fixture(scope="module", params=PROVEN)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = lively_model(request.param, tmp_path_factory.mktemp("model"))
    with served_pair(folder, compile="default", client={"compile": "default"}) as pair:
        if pair.engine.graphs is None:
            assert pair.split.decode_graphs is None
            pytest.skip("sessions of this family run one by one")
        yield pair


@pytest.mark.parametrize("name", NAMES)
def test_at_fixed_shapes_the_split_model_is_the_whole_model(pair: Pair, name: str) -> None:
    ours, theirs = pair.split.decode_graphs, pair.engine.graphs
    before = ours.steps
    found = CHECKS[name](pair)
    assert found.texts_equal
    # Two beams whose scores tie within rounding may stand in either order meanwhile.
    assert name == "beams" or found.relative <= CLOSE
    assert theirs.first_steps.proven
    assert not theirs.first_steps.failed
    assert not ours.first_steps.failed
    assert (ours.steps > before) != _slides(pair)


def test_what_is_recorded_on_a_gpu_looks_at_no_value(pair: Pair) -> None:
    CHECKS["batched_logits"](pair)
    ours, theirs = pair.split.decode_graphs, pair.engine.graphs
    looks = pair.split.config.model_type in LOOK
    assert theirs._graphs
    assert ours._graphs or _slides(pair)
    with pytest.raises(CannotBeRecorded) if looks else nullcontext(), NoLooks(), torch.inference_mode():
        for graph in theirs._graphs.values():
            graph._step()
        with ours._context.standing_in(lambda hidden_B1D: hidden_B1D):
            for graph in ours._graphs.values():
                graph._step()


def _slides(pair: Pair) -> bool:
    """Whether layers of the client's own keep a window only: their steps are the family's own."""
    cache = DynamicCache(config=pair.split.config)
    return any(layer.is_sliding for layer in (*cache.layers[:2], *cache.layers[-2:]))
