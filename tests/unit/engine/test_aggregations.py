"""Each aggregation stops the attack that it is there for, and the plain mean does not."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from splitlearn.engine import merge
from splitlearn.engine.aggregations import (
    AGGREGATIONS,
    aggregation_of,
    learning_rate,
    require_known,
    shares,
)
from splitlearn.engine.aggregations.krum import Krum, squared_distances
from splitlearn.engine.contribution import Gradients
from splitlearn.errors import SettingError
from splitlearn.vocabulary import CohortSettings

SHAPES = ((6, 4), (5,), (3, 7))
ENORMOUS = 1e6
VOTES = ("median", "trimmed_mean", "krum")


def settings(aggregation: str, byzantine: int = 1, rule: str = "sync", members: int = 9, **more):
    figures = {"norm_clip": {"member_norm": 10.0}, "mean": {}}.get(aggregation, {"byzantine": byzantine})
    return CohortSettings(rule, members=members, aggregation=aggregation, **figures, **more)


def numbers(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def honest(count: int, noise: float = 0.5) -> list[Gradients]:
    """What members with different batches of the same text give: one direction, and noise around it."""
    return [
        [true + noise * own for true, own in zip(numbers(0), numbers(1 + seed), strict=True)]
        for seed in range(count)
    ]


def times(gradients: Gradients, factor: float) -> Gradients:
    return [None if gradient is None else gradient * factor for gradient in gradients]


def merged(
    how: CohortSettings,
    each: Sequence[Gradients],
    weights: Sequence[float] = (),
    staleness: Sequence[int] = (),
) -> Gradients:
    given = shares(how, weights or [1.0] * len(each), staleness or [0] * len(each))
    return aggregation_of(how).merge(each, given)[0]


def flat(gradients: Gradients) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def outside(result: Gradients, range_of: Sequence[Gradients]) -> float:
    """How far the furthest coordinate is from what the honest members' values span."""
    rows = torch.stack([flat(each) for each in range_of])
    below, above = rows.min(dim=0).values - flat(result), flat(result) - rows.max(dim=0).values
    return float(torch.maximum(below, above).clamp_min(0).max())


def close(ours: Gradients, theirs: Gradients) -> bool:
    return torch.allclose(flat(ours), flat(theirs), rtol=1e-5, atol=1e-6)


def agreement(ours: Gradients, theirs: Gradients) -> float:
    return float(torch.nn.functional.cosine_similarity(flat(ours), flat(theirs), dim=0))


# ---------------------------------------------------------------- without an attack


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_of_members_who_agree_each_aggregation_is_their_mean(name):
    how, same = settings(name), honest(1) * 5
    assert close(merged(how, same), same[0])
    assert close(merged(how, same, staleness=[0, 3, 3, 0, 0][:5]), times(same[0], 0.8)) is (name != "krum")


def test_krum_of_old_gradients_is_as_much_smaller_as_the_chosen_one_is_old():
    same = honest(1) * 5
    assert close(merged(settings("krum"), same, staleness=[3, 0, 0, 0, 0]), times(same[0], 0.5))


@pytest.mark.parametrize("name", VOTES)
def test_votes_of_members_who_differ_are_no_weighted_mean(name):
    each, weights = honest(5), [1.0, 20.0, 3.0, 1.0, 1.0]
    assert not close(merged(settings(name), each, weights), merged(settings("mean"), each, weights))
    assert close(merged(settings(name), each, weights), merged(settings(name), each)), "one vote each"
    assert not close(merged(settings("mean"), each, weights), merged(settings("mean"), each))


@pytest.mark.parametrize("count", [5, 6])
def test_the_median_and_the_trimmed_mean_are_their_closed_forms(count):
    each = honest(count)
    rows = torch.stack([flat(gradients) for gradients in each]).double()
    assert torch.allclose(flat(merged(settings("median"), each)).double(), rows.quantile(0.5, dim=0))
    trimmed = rows.sort(dim=0).values[1:-1].mean(dim=0)
    assert torch.allclose(flat(merged(settings("trimmed_mean"), each)).double(), trimmed)


def test_krums_distances_are_those_of_all_weights_together():
    each = honest(6)
    rows = torch.stack([flat(gradients) for gradients in each]).double()
    assert torch.allclose(squared_distances(each), torch.cdist(rows, rows).square(), atol=1e-6)
    nearest = squared_distances(each).sort(dim=1).values[:, 1:4].sum(dim=1)
    assert Krum(1).choose(each) == int(nearest.argmin())


@pytest.mark.parametrize("name", VOTES)
def test_who_has_no_gradient_of_a_weight_votes_zero(name):
    """As in the mean, to which it adds nothing."""
    each = honest(5)
    without = [[None, *gradients[1:]] for gradients in each]
    assert merged(settings(name), without)[0] is None
    zeros = [[torch.zeros(SHAPES[0]), *each[0][1:]], *each[1:]]
    assert close(merged(settings(name), [without[0], *each[1:]]), merged(settings(name), zeros))


def test_a_norm_that_nobody_reaches_clips_nobody():
    each, weights = honest(4), [3.0, 1.0, 1.0, 2.0]
    ours, theirs = merged(settings("norm_clip"), each, weights), merged(settings("mean"), each, weights)
    assert all(map(torch.equal, ours, theirs))


# ---------------------------------------------------------------- one enormous member


@pytest.mark.parametrize("name", VOTES)
@pytest.mark.parametrize("factor", [ENORMOUS, -ENORMOUS, 1e15])
def test_one_member_scaled_by_a_million_moves_a_vote_no_further_than_the_honest_range(name, factor):
    others = honest(4)
    each = [*others, times(honest(5)[4], factor)]
    assert outside(merged(settings(name), each), others) == 0.0
    assert outside(merged(settings("mean"), each), others) > 1e5


def test_norm_clip_lets_no_member_count_more_than_its_norm():
    others = honest(4)
    false = times(honest(5)[4], -ENORMOUS)
    limit = 1.01 * max(merge.norm(each) for each in others)
    how = CohortSettings("sync", members=5, aggregation="norm_clip", member_norm=limit)
    mean = merged(settings("mean"), others)
    apart = flat(merged(how, [*others, false])) - 0.8 * flat(mean)
    assert float(apart.norm()) <= limit / 5 * 1.001
    assert merge.norm(merged(settings("mean"), [*others, false])) > 1e4 * limit
    assert agreement(merged(how, [*others, false]), mean) > 0.9


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_what_is_as_large_as_a_finite_norm_can_be_makes_no_infinity(name):
    each = [*honest(4), times(honest(1)[0], 1e17)]
    assert merge.is_finite(each[-1])
    assert all(bool(gradient.isfinite().all()) for gradient in merged(settings(name), each))


# ---------------------------------------------------------------- several that collude


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_as_many_sign_flipped_members_as_were_allowed_for_stay_in_range_and_one_more_does_not(name):
    def attacked(false: int) -> Gradients:
        return merged(settings(name, 2), [*others, *[times(others[0], -ENORMOUS)] * false])

    others = honest(3)
    assert outside(attacked(2), others) == 0.0
    assert outside(merged(settings("mean"), [*others, times(others[0], -ENORMOUS)]), others) > 1e5
    more = honest(2)
    beaten = merged(settings(name, 2), [*more, *[times(more[0], -ENORMOUS)] * 3])
    assert outside(beaten, more) > 1e5, "a majority is not stopped"


def test_krum_passes_over_colluders_who_all_give_the_same_and_not_over_too_many():
    others, wrong = honest(5), times(honest(1)[0], -1.0)
    chosen = merged(settings("krum", 2), [*others[:5], wrong, wrong])
    assert any(torch.equal(flat(chosen), flat(each)) for each in others)
    assert agreement(merged(settings("mean"), [*others[:3], *[wrong] * 4]), others[0]) < 0
    beaten = merged(settings("krum", 1), [*others[:2], wrong, wrong, wrong])
    assert torch.equal(flat(beaten), flat(wrong)), "three where one was allowed for are not stopped"


def test_krum_is_taken_in_by_colluders_who_hide_in_the_honest_members_noise():
    """Baruch et al. 2019: a little is enough."""
    others = honest(5)
    rows = [torch.stack(list(each)) for each in zip(*others, strict=True)]
    hidden = [each.mean(dim=0) - 0.3 * each.std(dim=0) for each in rows]
    assert torch.equal(flat(merged(settings("krum", 2), [*others, hidden, hidden])), flat(hidden))


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_a_coordinates_vote_is_biased_by_values_at_the_edge_of_the_honest_range(name):
    others = honest(5)
    lowest = [torch.stack(list(each)).amin(dim=0) for each in zip(*others, strict=True)]
    biased = flat(merged(settings(name, 2), [*others, lowest, lowest]))
    assert float((biased - flat(merged(settings(name, 2), others))).max()) <= 1e-6
    assert float((biased - flat(merged(settings("mean"), others))).mean()) < -0.1
    assert outside(merged(settings(name, 2), [*others, lowest, lowest]), others) == 0.0


# ---------------------------------------------------------------- what a member says of itself


@pytest.mark.parametrize("name", ["mean", "norm_clip"])
def test_a_stated_weight_takes_a_weighted_round_over_unless_it_is_limited(name):
    each, false = honest(4), times(honest(1)[0], -1.0)
    weights = [100.0] * 4 + [1e9]
    assert agreement(merged(settings(name), [*each, false], weights), false) > 0.99
    limited = merged(settings(name, max_weight=100.0), [*each, false], weights)
    assert agreement(limited, each[0]) > 0.5
    assert close(limited, merged(settings(name), [*each, false]))
    equal = merged(settings(name, weighting="equal"), [*each, false], weights)
    assert close(equal, limited), "or the stated weight would be heard where all count alike"


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_stated_learning_rate_moves_the_mean_alone(name):
    rates = [1e-3, 1e-3, 2e-3, 1e-3, 1e6]
    rate = learning_rate(settings(name), rates, [1.0] * 5)
    assert (rate == 1e-3) is (name != "mean")
    assert learning_rate(settings(name), [0.1] * 3, [1.0, 2.0, 3.0]) == 0.1
    assert learning_rate(settings(name, max_rate=1e-2), [1e6], [1.0]) == 1e-2
    assert learning_rate(settings(name, max_rate=1e-2), [1e-3], [1.0]) == 1e-3


# ---------------------------------------------------------------- settings


def test_each_aggregation_says_how_many_members_it_needs():
    least = {name: aggregation_of(settings(name, 2)).least for name in AGGREGATIONS}
    assert least == {"mean": 1, "norm_clip": 1, "median": 5, "trimmed_mean": 5, "krum": 7}


@pytest.mark.parametrize(
    ("wrong", "mend"),
    [
        (CohortSettings("sync", aggregation="vote"), "mean, norm_clip"),
        (CohortSettings("sync", aggregation="norm_clip"), "set member_norm="),
        (CohortSettings("sync", members=5, aggregation="krum"), "set byzantine="),
        (CohortSettings("sync", members=5, aggregation="mean", byzantine=1), "set aggregation="),
        (CohortSettings("sync", members=5, aggregation="median", byzantine=1, member_norm=1.0), "norm_clip"),
        (CohortSettings("sync", members=5, aggregation="median", byzantine=1, max_weight=9.0), "max_weight"),
        (CohortSettings("async", aggregation="norm_clip", member_norm=1.0), "set max_rate="),
        (CohortSettings("sync", members=4, aggregation="krum", byzantine=1), "needs 5 gradients"),
        (CohortSettings("sync", members=2, aggregation="median", byzantine=1), "needs 3 gradients"),
        (
            CohortSettings("quorum", members=9, quorum=4, aggregation="trimmed_mean", byzantine=2),
            "quorum=4 promises fewer",
        ),
        (
            CohortSettings("async", members=9, aggregation="median", byzantine=1),
            "use rule 'sync', or 'quorum'",
        ),
        (
            CohortSettings("buffered", members=9, buffer=9, aggregation="krum", byzantine=1),
            "one vote a round",
        ),
    ],
)
def test_what_would_protect_from_nobody_is_refused_with_the_mend(wrong, mend):
    with pytest.raises(SettingError, match=mend):
        require_known(wrong)


@pytest.mark.parametrize(
    "right",
    [
        CohortSettings(),
        CohortSettings("async", aggregation="norm_clip", member_norm=1.0, max_weight=4096.0, max_rate=1e-3),
        CohortSettings("buffered", buffer=3, aggregation="norm_clip", member_norm=1.0, max_rate=1e-3),
        CohortSettings("sync", members=5, aggregation="krum", byzantine=1),
        CohortSettings(
            "quorum", members=6, quorum=5, carry_late=True, aggregation="trimmed_mean", byzantine=2
        ),
    ],
)
def test_what_can_hold_is_taken(right):
    require_known(right)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_same_gradients_in_the_same_order_give_the_same_bits(name):
    """The order is that of the members' names. A sum in another order is another one in its last bit."""
    first, again = (flat(merged(settings(name), honest(7))) for _ in range(2))
    assert torch.equal(first, again)
    reversed_ = flat(merged(settings(name), honest(7)[::-1]))
    assert torch.allclose(first, reversed_, rtol=1e-5, atol=1e-6)
    assert torch.equal(first, reversed_) is (name in ("median", "krum"))
