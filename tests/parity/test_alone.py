from collections.abc import Callable

import pytest

from splitlearn.testing.pair import Pair
from splitlearn.testing.parity import ALONE, Distance


@pytest.mark.parametrize("check", ALONE.values(), ids=list(ALONE))
def test_alone_the_split_model_gives_what_the_whole_model_gives_bit_for_bit(
    pair: Pair, check: Callable[[Pair], Distance]
) -> None:
    found = check(pair)
    assert found.texts_equal
    assert found.bitwise, f"the logits differ by {found.relative:.1e} of the largest"
