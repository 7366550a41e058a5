from collections.abc import Callable

import pytest

from splitlearn.testing.pair import Pair
from splitlearn.testing.parity import BATCHED, DECODES, Distance

CLOSE = 1e-5


@pytest.mark.parametrize("check", BATCHED.values(), ids=list(BATCHED))
def test_sessions_of_different_length_in_one_batch_give_what_each_gives_alone(
    pair: Pair, check: Callable[[Pair], Distance]
) -> None:
    found = check(pair)
    assert found.texts_equal
    if pair.engine.trunk.batched:
        assert found.ragged >= len(DECODES), "the sessions did not meet"
        assert found.relative <= CLOSE
    else:
        assert found.ragged == 0
        assert found.bitwise
