"""Where an answer is lost on all tries, both sides end with the same steps done, or the user is told."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from splitlearn.client import run as client_run
from splitlearn.client.training import plan_run, prepare_training
from splitlearn.engine.run import Run
from splitlearn.errors import TrunkUnreachable, UnappliedGradients
from splitlearn.testing import split_over_loopback, tiny_model
from splitlearn.vocabulary import OptimizerSettings, Phase

WAIT_S = 20
IDS = torch.tensor([[5, 17, 42], [8, 9, 10]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_run, "ASK_AGAIN_S", (0.0,))


@contextmanager
def training(folder: Path) -> Iterator[tuple[Any, torch.optim.Optimizer]]:
    with split_over_loopback(folder) as split:
        prepare_training(split, LoraConfig(r=2, target_modules=["q_proj"]), None, (), seed=0)
        plan_run(split.trunk, OptimizerSettings("sgd", learning_rate=0.1))
        trained = [each for each in split.parameters() if each.requires_grad]
        yield split.train(), torch.optim.SGD(trained, lr=0.1)


def backward(split: Any) -> None:
    split(IDS, labels=IDS, use_cache=False).loss.backward()


@contextmanager
def losing(split: Any, phase: Phase, *, before: bool = False) -> Iterator[None]:
    """Each answer of this phase; the trunk has done the step, or with `before` never heard of it."""
    transport, honest = split.trunk.transport, split.trunk.transport.run_step

    def lossy(message: Any) -> Any:
        answer = None if before and message.key.phase is phase else honest(message)
        if message.key.phase is phase:
            raise TrunkUnreachable("the answer was lost")
        return answer

    transport.run_step = lossy
    with pytest.raises(TrunkUnreachable):
        yield
    transport.run_step = honest


def on_trunk(split: Any) -> tuple[int, int, int]:
    told = lambda run: (run.step, run.version, run.skipped)  # noqa: E731
    return split.trunk.transport._engine.runs.do(split.trunk.run.name, told).result(WAIT_S)


def weights(split: Any) -> dict[str, torch.Tensor]:
    copied: Any = lambda run: {name: each.detach().clone() for name, each in run.masters.items()}  # noqa: E731
    trunk = split.trunk.transport._engine.runs.do(split.trunk.run.name, copied).result(WAIT_S)
    own = {name: each.detach().clone() for name, each in split.named_parameters() if each.requires_grad}
    return trunk | own


def two_steps(folder: Path) -> dict[str, torch.Tensor]:
    with training(folder) as (split, optimizer):
        for _ in range(2):
            backward(split)
            split.trunk.step()
            optimizer.step()
            optimizer.zero_grad()
        return weights(split)


@pytest.mark.parametrize("before", [False, True], ids=["done", "never heard of"])
def test_a_step_whose_answer_is_lost_is_asked_for_again_and_done_once(folder, before) -> None:
    with training(folder) as (split, optimizer):
        backward(split)
        with losing(split, Phase.OPTIMIZER_STEP, before=before):
            split.trunk.step()
        with pytest.raises(UnappliedGradients, match=r"trunk\.step\(\) again"):
            backward(split)
        split.trunk.step()
        optimizer.step()
        optimizer.zero_grad()
        backward(split)
        split.trunk.step()
        optimizer.step()
        assert on_trunk(split) == (2, 2, 0)
        found = weights(split)
    assert all(torch.equal(found[name], each) for name, each in two_steps(folder).items())


def test_a_step_that_was_done_cannot_be_skipped_afterwards(folder) -> None:
    with training(folder) as (split, optimizer):
        backward(split)
        with losing(split, Phase.OPTIMIZER_STEP):
            split.trunk.step()
        for _ in range(2):
            with pytest.raises(UnappliedGradients, match=r"had done this step.*your own optimizer\.step\(\)"):
                split.trunk.skip_step()
        with pytest.raises(UnappliedGradients, match=r"trunk\.step\(\) again"):
            backward(split)
        assert on_trunk(split) == (1, 1, 0)
        split.trunk.step()
        optimizer.step()
        optimizer.zero_grad()
        backward(split)
        split.trunk.step()
        optimizer.step()
        assert on_trunk(split) == (2, 2, 0)
        found = weights(split)
    assert all(torch.equal(found[name], each) for name, each in two_steps(folder).items())


def test_a_step_that_the_trunk_never_heard_of_can_be_skipped(folder) -> None:
    with training(folder) as (split, _):
        backward(split)
        with losing(split, Phase.OPTIMIZER_STEP, before=True):
            split.trunk.step()
        split.trunk.skip_step()
        assert on_trunk(split) == (1, 0, 1)
        backward(split)


def test_a_step_that_was_skipped_cannot_be_done_afterwards(folder) -> None:
    with training(folder) as (split, _):
        backward(split)
        with losing(split, Phase.OPTIMIZER_STEP):
            split.trunk.skip_step()
        with pytest.raises(UnappliedGradients, match="had dropped this step's gradients"):
            split.trunk.step()
        split.trunk.skip_step()
        assert on_trunk(split) == (1, 0, 1)
        backward(split)
        split.trunk.step()
        assert on_trunk(split) == (2, 1, 1)


def test_where_a_backward_was_lost_too_no_step_is_taken(folder) -> None:
    with training(folder) as (split, _):
        with losing(split, Phase.BACKWARD):
            backward(split)
        with losing(split, Phase.OPTIMIZER_STEP):
            split.trunk.skip_step()
        for do in (split.trunk.step, lambda: backward(split)):
            with pytest.raises(UnappliedGradients, match="skip_step"):
                do()
        split.trunk.skip_step()
        gradients = split.trunk.transport._engine.runs.do(split.trunk.run.name, Run.gradients).result(WAIT_S)
        assert set(gradients.values()) == {None}
