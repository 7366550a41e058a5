import math
from collections import Counter
from itertools import chain, pairwise
from statistics import fmean, pvariance

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from splitlearn.errors import DataError, SettingError
from splitlearn.training.partition import LARGEST_ALPHA, SMALLEST_ALPHA, dirichlet, field, iid, shard

CLASSES = st.lists(st.integers(0, 6), min_size=1, max_size=120)
CLIENTS = st.integers(1, 12)
SEED = st.integers(0, 1 << 70)
TEN = [index % 10 for index in range(2000)]


def is_complete_and_disjoint(parts: list[list[int]], examples: int) -> bool:
    return sorted(chain(*parts)) == list(range(examples)) and all(part == sorted(part) for part in parts)


@given(st.integers(1, 300), CLIENTS, SEED)
def test_iid_gives_each_example_to_one_client_and_nearly_equal_numbers(examples, clients, seed):
    assume(examples >= clients)
    parts = iid(examples, clients, seed)
    assert is_complete_and_disjoint(parts, examples)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == iid(examples, clients, seed)


@given(CLASSES, CLIENTS, st.floats(SMALLEST_ALPHA, LARGEST_ALPHA), SEED, st.integers(0, 4))
def test_dirichlet_gives_each_example_to_one_client_and_everyone_enough(
    classes, clients, alpha, seed, at_least
):
    assume(len(classes) >= clients * at_least)
    parts = dirichlet(classes, clients, alpha, seed, at_least)
    assert len(parts) == clients
    assert is_complete_and_disjoint(parts, len(classes))
    assert min(map(len, parts)) >= at_least
    assert parts == dirichlet(classes, clients, alpha, seed, at_least)


@given(CLASSES, CLIENTS, SEED, st.integers(1, 4))
def test_shard_gives_each_example_to_one_client_and_few_classes_each(classes, clients, seed, shards_each):
    shards = clients * shards_each
    assume(len(classes) >= shards)
    parts = shard(classes, clients, seed, shards_each)
    assert len(parts) == clients
    assert is_complete_and_disjoint(parts, len(classes))
    assert max(map(len, parts)) - min(map(len, parts)) <= shards_each
    # A shard as long as the rarest class, or shorter, has no more than two.
    if math.ceil(len(classes) / shards) <= min(Counter(classes).values()):
        assert all(len({classes[index] for index in part}) <= 2 * shards_each for part in parts)
    assert parts == shard(classes, clients, seed, shards_each)


@given(CLASSES, st.none() | CLIENTS, SEED)
def test_field_gives_each_class_whole_to_one_client(classes, clients, seed):
    values = len(set(classes))
    assume(clients is None or clients <= values)
    parts = field(classes, clients, seed)
    assert len(parts) == (clients or values)
    assert is_complete_and_disjoint(parts, len(classes))
    held = [{classes[index] for index in part} for part in parts]
    assert sum(map(len, held)) == values
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_without_a_number_of_clients_each_class_is_one_in_the_classes_order():
    assert field([2, 0, 2, 1], None, seed=5) == [[1], [3], [0, 2]]


def skew(parts: list[list[int]], classes: list[int]) -> float:
    """How far the mean client's mixture is from the whole's: 0 the same, towards 1 a rare class alone."""
    whole = Counter(classes)
    distances = []
    for part in filter(None, parts):
        own = Counter(classes[index] for index in part)
        distances.append(sum(abs(own[c] / len(part) - whole[c] / len(classes)) for c in whole) / 2)
    return fmean(distances)


def mean_skew(scheme, **how) -> float:
    return fmean(skew(scheme(TEN, 10, seed=seed, **how), TEN) for seed in range(10))


def test_a_smaller_alpha_is_more_skewed_and_a_large_one_is_as_iid():
    iid_skew = fmean(skew(iid(len(TEN), 10, seed), TEN) for seed in range(10))
    skews = [mean_skew(dirichlet, alpha=alpha) for alpha in (0.05, 0.5, 5, 500)]
    assert all(smaller > 1.3 * larger for smaller, larger in pairwise(skews))
    assert skews[-1] < 1.2 * iid_skew < 0.2
    assert mean_skew(shard) > 0.7 > 5 * iid_skew


def test_the_same_alpha_is_as_skewed_with_other_seeds():
    """The control: of two sets of draws with one alpha neither is much more skewed."""
    one, other = (
        fmean(skew(dirichlet(TEN, 10, 0.5, seed), TEN) for seed in seeds)
        for seeds in (range(20), range(100, 120))
    )
    assert one == pytest.approx(other, rel=0.1)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_shares_have_the_mean_and_variance_of_the_distribution(alpha):
    clients, classes = 4, [0] * 1000
    drawn = [[len(part) / 1000 for part in dirichlet(classes, clients, alpha, s, 0)] for s in range(500)]
    variance = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    for shares in zip(*drawn, strict=True):
        assert fmean(shares) == pytest.approx(1 / clients, abs=5 * math.sqrt(variance / 500))
        assert pvariance(shares) == pytest.approx(variance, rel=0.35)


def test_classes_of_one_example_go_to_all_clients_alike():
    """Rounding must not favour a place: with equal shares each such class is anyone's."""
    held = [len(part) for part in dirichlet(range(4000), 4, 1000, seed=0)]
    assert all(900 < count < 1100 for count in held)


def test_another_seed_deals_otherwise():
    for dealt in (
        lambda seed: iid(100, 4, seed),
        lambda seed: dirichlet(TEN, 4, 1.0, seed),
        lambda seed: shard(TEN, 4, seed),
        lambda seed: field(TEN, 4, seed),
    ):
        assert dealt(0) != dealt(1)


def test_what_is_dealt_does_not_change_between_versions():
    """A simulation that is run again elsewhere has the same clients."""
    classes = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert iid(10, 3, seed=0) == [[0, 2, 3, 9], [1, 7, 8], [4, 5, 6]]
    assert dirichlet(classes, 3, 0.5, seed=0) == [[0, 4, 6, 9], [1, 2, 3, 8], [5, 7]]
    assert shard(classes, 2, seed=0) == [[1, 2, 5, 7, 8], [0, 3, 4, 6, 9]]
    assert field(classes, 2, seed=0) == [[0, 2, 3, 5, 6, 8, 9], [1, 4, 7]]


@pytest.mark.parametrize(
    "dealt",
    [
        lambda: iid(3, 4, seed=0),
        lambda: dirichlet([0, 1, 0], 2, 1.0, seed=0),
        lambda: shard([0, 1, 0], 2, seed=0),
    ],
)
def test_too_few_examples_for_so_many_clients_are_refused(dealt):
    with pytest.raises(DataError, match="name fewer clients, ask for less, or add examples"):
        dealt()


def test_fewer_values_than_clients_are_refused():
    with pytest.raises(DataError, match="name fewer clients, or another field"):
        field([0, 1, 0, 1], 3, seed=0)


@pytest.mark.parametrize("alpha", [0, -1.0, 1e-7, 1e7, math.inf, math.nan])
def test_an_alpha_that_cannot_be_drawn_with_is_refused(alpha):
    with pytest.raises(SettingError, match="alpha"):
        dirichlet(TEN, 4, alpha, seed=0)


@pytest.mark.parametrize("clients", [0, -1])
def test_no_clients_are_refused(clients):
    for dealt in (
        lambda: iid(9, clients, 0),
        lambda: dirichlet(TEN, clients, 1, 0),
        lambda: shard(TEN, clients, 0),
        lambda: field(TEN, clients, 0),
    ):
        with pytest.raises(SettingError, match="name at least 1"):
            dealt()
    with pytest.raises(SettingError, match="shards"):
        shard(TEN, 4, 0, shards_each=0)
