"""What the mean of adapters loses is known in closed form, and made up for."""

import pytest
import torch
from torch import Tensor

from splitlearn.engine.averaging import added, mean_of
from splitlearn.model.thin import Thin, combined, norm, thinned

SHARES = (1.0, 2.0, 5.0)
SIZES = {"q_proj": (12, 9), "down_proj": (7, 16)}
RANK = 3


def adapter(seed: int, a_seed: int | None = None) -> dict[str, Tensor]:
    draw, draw_a = (torch.Generator().manual_seed(each) for each in (seed, a_seed or 1000 + seed))
    weights = {}
    for module, (out, into) in SIZES.items():
        weights[f"{module}.lora_A.weight"] = torch.randn(RANK, into, generator=draw_a)
        weights[f"{module}.lora_B.weight"] = torch.randn(out, RANK, generator=draw)
    return weights


def product(weights: dict[str, Tensor], module: str) -> Tensor:
    return weights[f"{module}.lora_B.weight"].double() @ weights[f"{module}.lora_A.weight"].double()


def mean_of_products(each: list[dict[str, Tensor]], module: str) -> Tensor:
    parts = zip(each, SHARES, strict=True)
    return sum(product(weights, module) * share for weights, share in parts) / sum(SHARES)


def missing(each, found) -> float:
    """By multiplying everything out."""
    away, whole = [], []
    for module in SIZES:
        wanted = mean_of_products(each, module)
        has = product(found.weights, module)
        if module in found.residual:
            has = has + found.residual[module].dense()
        away.append((wanted - has).norm())
        whole.append(wanted.norm())
    return float(torch.stack(away).norm() / torch.stack(whole).norm())


THREE = [adapter(seed) for seed in range(3)]


@pytest.mark.parametrize("rule", ["fedavg", "fedex"])
def test_what_is_lost_is_told(rule):
    found = mean_of(rule, THREE, SHARES)
    assert found.aggregation_residual == pytest.approx(missing(THREE, found), rel=1e-5, abs=1e-7)
    assert (found.aggregation_residual > 1e-3) == (rule == "fedavg")
    assert found.aggregation_residual < 1e-6 or rule == "fedavg"


def test_nothing_is_lost_where_all_have_the_same_a():
    frozen = [adapter(seed, a_seed=7) for seed in range(3)]
    assert mean_of("fedavg", frozen, SHARES).aggregation_residual < 1e-6
    given = [{name: each for name, each in weights.items() if "lora_B" in name} for weights in frozen]
    found = mean_of("ffa", given, SHARES)
    assert found.aggregation_residual == 0
    for name, mean in found.weights.items():
        wanted = sum(each[name] * share for each, share in zip(given, SHARES, strict=True)) / sum(SHARES)
        torch.testing.assert_close(mean, wanted)


def test_the_residual_is_as_thin_as_the_members_deviations_are():
    found = mean_of("fedex", THREE, SHARES)
    ranks = {module: residual.rank for module, residual in found.residual.items()}
    assert ranks == {module: min((len(THREE) - 1) * RANK, *size) for module, size in SIZES.items()}


def test_the_residual_has_no_members_factors_in_it():
    """Its columns are the matrix's own singular vectors, and orthogonal; those of a member are not."""
    for residual in mean_of("fedex", THREE, SHARES).residual.values():
        overlaps = residual.up_OR.T @ residual.up_OR
        assert (overlaps - overlaps.diag().diag()).abs().max() < 1e-4


def test_weights_decide_and_without_any_all_count_alike():
    even = mean_of("fedavg", THREE, (0.0, 0.0, 0.0)).weights
    assert all(torch.equal(even[n], each) for n, each in mean_of("fedavg", THREE, (3, 3, 3)).weights.items())
    alone = mean_of("fedavg", THREE, (0.0, 4.0, 0.0))
    assert all(torch.equal(alone.weights[name], each) for name, each in THREE[1].items())
    assert alone.aggregation_residual < 1e-6
    assert not torch.equal(even["q_proj.lora_B.weight"], alone.weights["q_proj.lora_B.weight"])


def test_adapters_that_do_nothing_lose_nothing():
    nothing = {name: torch.zeros_like(each) for name, each in THREE[0].items()}
    found = mean_of("fedex", [nothing, nothing], (1, 1))
    assert found.aggregation_residual == 0
    assert not found.residual


def test_residuals_add_up_and_never_grow_beyond_the_matrix():
    """By three of rank 3 each, both modules are full; what comes then takes no more room."""
    each = [mean_of("fedex", [adapter(s), adapter(s + 1)], (1, 2)).residual for s in (1, 5, 9, 13)]
    total, ranks = {}, []
    for residual in each:
        total = added(total, residual)
        ranks.append([total[module].rank for module in SIZES])
    assert ranks == [[3, 3], [6, 6], [9, 7], [9, 7]]
    for module in SIZES:
        wanted = sum(residual[module].dense() for residual in each)
        torch.testing.assert_close(total[module].dense(), wanted, rtol=1e-5, atol=1e-5)


def test_a_matrix_is_thinned_to_its_rank_and_its_norm_is_its_own():
    thin = Thin(torch.randn(8, 2), torch.randn(2, 5))
    doubled = combined([thin, thin], [1.0, 1.0])
    assert (doubled.rank, thinned(doubled).rank) == (4, 2)
    torch.testing.assert_close(thinned(doubled).dense(), 2 * thin.dense(), rtol=1e-4, atol=1e-5)
    assert norm(doubled) == pytest.approx(float(2 * thin.dense().norm()), rel=1e-5)
    assert thinned(combined([thin, thin], [1.0, -1.0]), floor=1e-9).rank == 0
