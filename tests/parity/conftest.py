from collections.abc import Iterator

import pytest

from splitlearn.testing.pair import Pair, lively_model, served_pair
from splitlearn.testing.tiny import PROVEN, UNLISTED, VARIANTS

FAMILIES = [*PROVEN, *VARIANTS, *UNLISTED]


@pytest.fixture(scope="session", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Whole and split, over a real server; one family's server runs at a time."""
    folder = lively_model(request.param, tmp_path_factory.mktemp("model"))
    with served_pair(folder) as pair:
        yield pair
