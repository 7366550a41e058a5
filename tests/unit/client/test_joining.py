"""A run is joined with the settings that it has; others are named, and cost its member nothing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig

from splitlearn import AutoSplitModelForCausalLM, TrunkServer
from splitlearn.client.training import plan_run
from splitlearn.errors import RunLost, SettingError
from splitlearn.testing.tiny import tiny_model
from splitlearn.vocabulary import OptimizerSettings, TapeSettings

IDS = torch.tensor([[5, 17, 42]])
Loaded = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrunkServer]:
    folder = tiny_model("llama", tmp_path_factory.mktemp("model"))
    sessions = {"session_tokens": 64, "kv_budget_bytes": 1 << 20}
    state = tmp_path_factory.mktemp("state")
    with TrunkServer(folder, port=0, device="cpu", sessions=sessions, state_dir=state) as running:
        yield running


def lora(**how: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | how))


@pytest.fixture
def loaded(server: TrunkServer) -> Loaded:
    @contextmanager
    def load(run: str = "notes", **how: Any) -> Iterator[Any]:
        told = {"lora": lora(), "seed": 7} | how
        model = AutoSplitModelForCausalLM.from_pretrained(
            server.config.model, trunk=server.address, run=run, **told
        )
        try:
            yield model
        finally:
            model.close()

    return load


def step(model: Any) -> None:
    model(IDS, labels=IDS).loss.backward()
    model.trunk.step()


DIFFERENT: dict[str, dict[str, Any]] = {
    "seed: 7, not 8": {"seed": 8},
    "LoRA's alpha: 4.0, not 8": {"lora": lora(lora_alpha=8)},
    "LoRA's dropout: 0.0, not 0.5": {"lora": lora(lora_dropout=0.5)},
    "LoRA's r: 2, not 3": {"lora": lora(r=3)},
    "allow_download: True, not False": {"allow_download": False},
}


@pytest.mark.parametrize("named", DIFFERENT)
def test_who_joins_with_another_setting_is_told_which_and_turns_nobody_away(loaded, named) -> None:
    with loaded() as member:
        step(member)
        with loaded(**DIFFERENT[named]) as other, pytest.raises(SettingError) as refused:
            step(other)
        assert named in refused.value.message
        assert "another run name" in refused.value.message
        step(member)
        member.trunk.start_over()


def test_all_that_differs_is_named_at_once(loaded) -> None:
    with loaded() as member:
        step(member)
        with (
            loaded(seed=8, lora=lora(lora_alpha=8)) as other,
            pytest.raises(SettingError, match=r"alpha.*seed"),
        ):
            step(other)
        member.trunk.start_over()


def test_who_joins_with_another_optimizer_turns_nobody_away_either(loaded) -> None:
    with loaded() as member:
        step(member)
        with loaded() as other:
            plan_run(other.trunk, OptimizerSettings("sgd"))
            with pytest.raises(SettingError, match="sgd"):
                step(other)
        step(member)
        member.trunk.start_over()


def test_who_joins_with_the_same_settings_takes_over(loaded) -> None:
    """How the tape is kept may differ: the gradients are the same."""
    with loaded() as member:
        step(member)
        with loaded(tape=TapeSettings(recompute=True)) as other:
            step(other)
            assert other.trunk.run.step == 2
            with pytest.raises(RunLost, match="joined again"):
                step(member)
            other.trunk.start_over()


def test_a_checkpoint_of_another_seed_is_not_restored_silently(loaded) -> None:
    with loaded("saved") as member:
        step(member)
        member.trunk.save()
    with loaded("saved", seed=8) as other:
        with pytest.raises(SettingError, match="seed: 7, not 8"):
            other.trunk.restore("saved", 1)
        other.trunk.start_over()


def test_what_a_dead_incarnation_accumulated_is_discarded(loaded) -> None:
    """Its client is gone between a backward and its step; the next one's step uses its own gradient alone."""
    ends = []
    for run, dies in (("plain", False), ("fenced", True)):
        with loaded(run) as dead:
            step(dead)
            if dies:
                dead(IDS.flip(1), labels=IDS.flip(1)).loss.backward()
        with loaded(run) as other:
            step(other)
            ends.append(other.trunk.transport.download_adapter(run).weights)
            assert other.trunk.run.step == 2
            other.trunk.start_over()
    assert all(torch.equal(ends[1][name], each) for name, each in ends[0].items())
