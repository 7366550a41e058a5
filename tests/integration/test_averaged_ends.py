"""Members' own bottoms and tops are averaged through the server, and what that loses is known, or made up for."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from splitlearn import AutoSplitModelForCausalLM, CohortSettings, ShareSettings, TrunkServer
from splitlearn.errors import AdapterError, MessageError, ResourceExhausted, RunLost, SettingError
from splitlearn.model.lora import ADAPTER
from splitlearn.testing import lively_model, tiny_whole
from splitlearn.vocabulary import StepKey
from splitlearn.wire.messages import GivenEnds

pytestmark = pytest.mark.timeout(120)

WAIT_S, RATE, LEASE_S = 60, 1.0, 6.0
LORA = LoraConfig(r=2, lora_alpha=6, target_modules="all-linear")
NAMES = ("a", "b", "c")
SHARES = (1.0, 2.0, 5.0)
THREE = CohortSettings("sync", members=3)
IDS = torch.tensor([[5, 17, 42, 8, 11], [3, 9, 81, 20, 7]])
Weights = dict[str, Tensor]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model("llama", tmp_path_factory.mktemp("llama"))


def server_of(folder: Path, state_dir: Path, **runs: Any) -> TrunkServer:
    return TrunkServer(
        folder,
        port=0,
        device="cpu",
        dtype="float32",
        state_dir=state_dir,
        drain_s=0.1,
        sessions={"session_tokens": 64, "kv_budget_bytes": 1 << 20},
        runs={"member_lease_s": LEASE_S, **runs},
    )


def member(folder: Path, server: TrunkServer, name: str, share: ShareSettings, **how: Any) -> PreTrainedModel:
    split = AutoSplitModelForCausalLM.from_pretrained(
        folder,
        trunk=server.address,
        dtype="float32",
        **{"lora": LORA, "run": "together", "cohort": THREE, "member": name, "share": share} | how,
    )
    return split.train()


@contextmanager
def members(
    folder: Path, state_dir: Path, share: ShareSettings, names: Sequence[str] = NAMES, **runs: Any
) -> Iterator[list[PreTrainedModel]]:
    cohort = replace(THREE, members=len(names))
    with server_of(folder, state_dir, **runs) as server:
        splits = [member(folder, server, name, share, cohort=cohort) for name in names]
        try:
            yield splits
        finally:
            for split in splits:
                split.close()


def at_once(what: Callable[[int], Any], count: int) -> list[Any]:
    with ThreadPoolExecutor(count) as threads:
        return [each.result(WAIT_S) for each in [threads.submit(what, number) for number in range(count)]]


def take_step(split: PreTrainedModel, number: int, weight: float) -> None:
    """Each member moves its own way."""
    batch = (IDS + 7 * number) % 125 + 3
    split(batch, labels=batch, use_cache=False).loss.backward()
    split.trunk.step(learning_rate=RATE, weight=weight)
    split.trunk.ends.pull()
    with torch.no_grad():
        for each in own(split):
            each.sub_(each.grad, alpha=RATE * (1 + number))
            each.grad = None


def own(split: PreTrainedModel) -> list[Tensor]:
    return [each for each in split.parameters() if each.requires_grad]


def layers(split: PreTrainedModel) -> dict[str, LoraLayer]:
    return {name: each for name, each in split.named_modules() if isinstance(each, LoraLayer)}


def products(split: PreTrainedModel) -> Weights:
    return {
        name: each.lora_B[ADAPTER].weight.detach().double() @ each.lora_A[ADAPTER].weight.detach().double()
        for name, each in layers(split).items()
    }


def merged(split: PreTrainedModel) -> Weights:
    """Base and adapter of each module as one."""
    return {
        name: each.get_base_layer().weight.detach() + each.get_delta_weight(ADAPTER).detach()
        for name, each in layers(split).items()
    }


def bases(split: PreTrainedModel) -> Weights:
    return {name: each.get_base_layer().weight.detach().clone() for name, each in layers(split).items()}


def apart(ours: Weights, theirs: Weights) -> float:
    away = torch.cat([(ours[name].double() - theirs[name].double()).flatten() for name in theirs])
    return float(away.norm() / torch.cat([each.double().flatten() for each in theirs.values()]).norm())


def mean(each: Sequence[Weights]) -> Weights:
    return {
        name: sum(one[name] * share for one, share in zip(each, SHARES, strict=True)) / sum(SHARES)
        for name in each[0]
    }


def changes(split: PreTrainedModel, found: Weights, base: Weights) -> Weights:
    """What adapters and additions to the base are together, less the adapter's scale."""
    off = {name: found[name].double() - base[name].double() for name in found}
    return {
        name: (off[name].T if each.fan_in_fan_out else off[name]) / each.scaling[ADAPTER]
        for name, each in layers(split).items()
    }


def trained_apart(splits: Sequence[PreTrainedModel], steps: int = 1) -> None:
    def train(number: int) -> None:
        for _ in range(steps):
            take_step(splits[number], number, SHARES[number])

    at_once(train, len(splits))


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "fedex"])
def test_after_an_average_all_have_the_mean_of_the_products_or_know_what_is_lost(model, tmp_path, rule):
    with members(model, tmp_path, ShareSettings(rule, every=2)) as splits:
        first = bases(splits[0])
        for number in (1, 2):
            trained_apart(splits, steps=2)
            update, wanted = mean([products(split) for split in splits]), mean(list(map(merged, splits)))
            before = bases(splits[0])
            told = at_once(lambda number: splits[number].trunk.ends.average(), 3)
            found = merged(splits[0])
            for split in splits[1:]:
                assert all(torch.equal(each, found[name]) for name, each in merged(split).items())
            assert {each.number for each in told} == {number}
            assert {each.members for each in told} == {3}
            lost = told[0].aggregation_residual
            if rule == "fedavg":
                # The mean of the products less the product of the means.
                by_hand = apart(products(splits[0]), update)
                assert lost == pytest.approx(by_hand, rel=1e-4)
                assert by_hand > 1e-3
                assert apart(found, wanted) > 1e-5
            else:
                assert lost <= 1e-5
                assert apart(found, wanted) <= 1e-5
                assert apart(changes(splits[0], found, before), update) <= 1e-5
        assert (apart(bases(splits[0]), first) > 0) == (rule == "fedex")
