"""On a GPU the split model gives what the whole model gives there, alone and in a batch."""

from collections.abc import Callable, Iterator

import pytest
import torch

from splitlearn.errors import UnsupportedCall
from splitlearn.testing.pair import Pair, lively_model, served_pair
from splitlearn.testing.parity import ALONE, BATCHED, DECODES, Distance

pytestmark = pytest.mark.gpu

FAMILIES = ["llama", "gemma3_text", "gpt2", "gpt_oss", "deepseek_v3", "bloom"]
CLOSE = 1e-4
RECORDED = ("llama", "gpt2")


@pytest.fixture(scope="module", params=["off", "default"])
def compile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, compile: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """`default` on both sides: decode steps as CUDA graphs."""
    folder = lively_model(request.param, tmp_path_factory.mktemp("model"))
    how = {"compile": compile}
    with served_pair(folder, device="cuda", client={"compile": compile}, **how) as pair:
        assert pair.engine.trunk.device.type == pair.split.device.type == "cuda"
        yield pair


@pytest.mark.parametrize("check", ALONE.values(), ids=list(ALONE))
def test_alone_on_a_gpu_the_split_model_is_the_whole_model(
    pair: Pair, check: Callable[[Pair], Distance]
) -> None:
    found = check(pair)
    assert found.texts_equal
    assert found.relative <= CLOSE


@pytest.mark.parametrize("check", BATCHED.values(), ids=list(BATCHED))
def test_sessions_in_one_batch_on_a_gpu_give_what_each_gives_alone(
    pair: Pair, check: Callable[[Pair], Distance]
) -> None:
    found = check(pair)
    assert found.texts_equal
    assert found.relative <= CLOSE
    if pair.engine.trunk.batched:
        assert found.ragged >= len(DECODES), "the sessions did not meet"


def test_where_it_is_asked_for_decode_steps_are_recorded(pair: Pair, compile: str) -> None:
    ALONE["greedy"](pair)
    if compile == "off":
        assert pair.engine.graphs is pair.split.decode_graphs is None
    elif pair.split.config.model_type in RECORDED:
        assert pair.engine.graphs.recorded
        assert pair.engine.graphs.first_steps.proven
        assert pair.split.decode_graphs.steps
        assert pair.split.decode_graphs.first_steps.proven
        failed = [side.first_steps.failed for side in (pair.engine.graphs, pair.split.decode_graphs)]
        assert failed == [False, False]


def test_an_offloaded_cache_is_refused_before_it_goes_wrong(pair: Pair) -> None:
    ids = torch.tensor([[5, 6, 7]]).cuda()
    with pytest.raises(UnsupportedCall, match="offloaded"):
        pair.split.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="offloaded")
