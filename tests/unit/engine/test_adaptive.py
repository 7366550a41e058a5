"""Fedadam and fedyogi are the paper's algorithm 2, and go on from a checkpoint bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from splitlearn.engine.optimizer import build, state_bytes
from splitlearn.engine.run import Run
from splitlearn.errors import SettingError
from splitlearn.vocabulary import SERVER_OPTIMIZERS, OptimizerSettings, RunSettings

SHAPES = {"lower": (5, 3), "upper": (4,)}
RATES = (0.1, 0.05, 0.1, 0.2, 0.02, 0.1)


def settings(name: str, **other: float) -> OptimizerSettings:
    return OptimizerSettings(name, beta1=0.9, beta2=0.99, **{"epsilon": 1e-3} | other)


def numbers(seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    # The third step's are small: there fedyogi forgets what came before more slowly.
    return [torch.randn(shape, generator=draw) * (0.01 if seed == 3 else 1.0) for shape in SHAPES.values()]


def a_run(name: str, **other: float) -> Run:
    weights = dict(zip(SHAPES, numbers(0), strict=True))
    return Run("notes", RunSettings(optimizer=settings(name, **other)), None, weights, b"me")


def train(run: Run, steps: range) -> Run:
    for step in steps:
        run.step_with(numbers(step + 1), RATES[step])
    return run


def weights_of(run: Run) -> list[Tensor]:
    return [weight.detach().clone() for weight in run.masters.values()]


def algorithm_2(name: str, place: int, steps: int, tau: float = 1e-3) -> np.ndarray:
    """Delta is what the round would move, v begins with tau ** 2, nothing is corrected for its start."""
    x = numbers(0)[place].double().numpy()
    m, v = np.zeros_like(x), np.full_like(x, tau**2)
    for step in range(steps):
        delta = -numbers(step + 1)[place].double().numpy()
        m = 0.9 * m + 0.1 * delta
        if name == "fedadam":
            v = 0.99 * v + 0.01 * delta**2
        else:
            v = v - 0.01 * delta**2 * np.sign(v - delta**2)
        x = x + RATES[step] * m / (np.sqrt(v) + tau)
    return x


def off_by(ours: Tensor, theirs: np.ndarray) -> float:
    return float(np.abs(ours.double().numpy() - theirs).max())


@pytest.mark.parametrize("steps", [1, 2, len(RATES)])
@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_its_steps_are_the_papers(name, steps):
    ours = weights_of(train(a_run(name), range(steps)))
    for place, weight in enumerate(ours):
        assert off_by(weight, algorithm_2(name, place, steps)) < 1e-5
        if steps == len(RATES):
            other = "fedyogi" if name == "fedadam" else "fedadam"
            assert off_by(weight, algorithm_2(other, place, steps)) > 1e-3
            assert off_by(weight, algorithm_2(name, place, steps, tau=1e-1)) > 1e-2


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_it_is_not_adam(name):
    """Whose moments are corrected for their start, so that its first step is the learning rate."""
    ours, adams = (weights_of(train(a_run(each), range(3))) for each in (name, "adamw_torch"))
    assert all(float((a - b).abs().max()) > 1e-2 for a, b in zip(ours, adams, strict=True))


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_it_goes_on_from_a_snapshot_bit_for_bit(name):
    undisturbed = train(a_run(name), range(6))
    half = train(a_run(name), range(3)).snapshot()
    restored, forgetful = a_run(name), a_run(name)
    restored.restore(half)
    forgetful.restore(replace(half, optimizer={}))
    expected = weights_of(undisturbed)
    assert all(map(torch.equal, weights_of(train(restored, range(3, 6))), expected))
    assert not any(map(torch.equal, weights_of(train(forgetful, range(3, 6))), expected))


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_what_it_is_charged_for_is_what_it_keeps(name):
    run = train(a_run(name), range(1))
    kept = sum(value.nbytes for state in run.optimizer.state.values() for value in state.values())
    assert kept == state_bytes(settings(name), sum(weight.nbytes for weight in run.masters.values()))


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_a_weight_without_a_gradient_stays(name):
    run = a_run(name)
    before = weights_of(run)
    run.step_with([None, numbers(1)[1]], 0.1)
    assert [torch.equal(*each) for each in zip(before, weights_of(run), strict=True)] == [True, False]


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
@pytest.mark.parametrize(
    ("wrong", "mend"),
    [({"weight_decay": 0.1}, "set it to 0"), ({"epsilon": 0.0}, "1e-3"), ({"beta2": 1.0}, "between 0 and 1")],
)
def test_constants_that_the_paper_has_no_use_for_are_refused(name, wrong, mend):
    weights = [torch.zeros(1, requires_grad=True)]
    with pytest.raises(SettingError, match=mend):
        build(replace(settings(name), **wrong), weights)
    build(settings(name), weights)
