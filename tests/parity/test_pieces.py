"""Prompts that run in pieces of three tokens give what the whole model gives."""

from collections.abc import Callable, Iterator

import pytest

from splitlearn.model.families import PROVEN as TABLE
from splitlearn.testing.pair import Pair, lively_model, served_pair
from splitlearn.testing.parity import (
    Distance,
    batched_greedy,
    beams,
)
from splitlearn.testing.tiny import PROVEN

CLOSE = 1e-5
CHECKS = (beams, batched_greedy)


@pytest.fixture(scope="module", params=[family for family in PROVEN if TABLE[family].batched])
def in_pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = lively_model(request.param, tmp_path_factory.mktemp("model"))
    with served_pair(folder, batching={"prefill_chunk_tokens": 3}) as pair:
        yield pair


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_prompt_in_pieces_gives_what_the_whole_model_gives(
    in_pieces: Pair, check: Callable[[Pair], Distance]
) -> None:
    found = check(in_pieces)
    assert found.texts_equal
    assert found.relative <= CLOSE
