"""Members' own ends are averaged through the server, and what that loses is known, or made up for."""

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


def server_of(folder: Path, state_dir: Path, port: int = 0, **runs: Any) -> TrunkServer:
    return TrunkServer(
        folder,
        port=port,
        device="cpu",
        dtype="float32",
        state_dir=state_dir,
        drain_s=0.1,
        sessions={"session_tokens": 64, "kv_budget_bytes": 1 << 20},
        runs={"member_lease_s": LEASE_S, **runs},
    )


def member(
    folder: Path, server: TrunkServer | None, name: str, share: ShareSettings, **how: Any
) -> PreTrainedModel:
    if server is not None:
        how["trunk"] = server.address
    split = AutoSplitModelForCausalLM.from_pretrained(
        folder,
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
        keys = {name: state_dir / f"key-{name}" for name in names}
        splits = [member(folder, server, each, share, cohort=cohort, member_key=keys[each]) for each in names]
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
    split.trunk.own_ends.pull()
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
            told = at_once(lambda number: splits[number].trunk.own_ends.average(), 3)
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


# ---------------------------------------------------------------- who is there, and who is not


def averaged(splits: Sequence[PreTrainedModel]) -> list[Any]:
    return at_once(lambda number: splits[number].trunk.own_ends.average(), len(splits))


def same_ends(ours: PreTrainedModel, theirs: PreTrainedModel) -> bool:
    return apart(merged(ours), merged(theirs)) <= 1e-6 and apart(products(ours), products(theirs)) <= 1e-6


def test_a_member_that_is_gone_is_not_waited_for_and_has_the_average_when_it_is_back(llama, tmp_path):
    with members(llama, tmp_path, ShareSettings("fedex", every=1), member_lease_s=2.0) as splits:
        trained_apart(splits, steps=2)
        splits[2].trunk.run.end()  # it says no longer that it is there
        both = averaged(splits[:2])
        assert [each.members for each in both] == [2, 2]
        assert not same_ends(splits[2], splits[0])
        at_once(lambda number: take_step(splits[number], number, SHARES[number]), 2)
        averaged(splits[:2])
        # Two were made without it: it is given the newest, and all that was ever added to the bases.
        assert splits[0].trunk.own_ends.residuals
        address = splits[2].trunk.transport.address
        splits[2].close()
        how = {"trunk": address, "member_key": tmp_path / "key-c"}
        splits[2] = member(llama, None, "c", ShareSettings("fedex", every=1), **how)
        assert splits[2].trunk.own_ends.average().number == 2
        assert same_ends(splits[2], splits[0])


def test_who_joins_late_begins_with_the_newest_average_and_holds_nobody_up(llama, tmp_path):
    share = ShareSettings("fedex", every=1)
    with server_of(llama, tmp_path) as server:
        two = replace(THREE, members=2)
        splits = [member(llama, server, name, share, cohort=two) for name in "ab"]
        trained_apart(splits, steps=2)
        averaged(splits)
        trained_apart(splits)
        late = member(llama, server, "c", share, cohort=two)
        with ThreadPoolExecutor(3) as threads:
            # It has not asked for the average: its round waits for those who wait for the next one.
            step = threads.submit(take_step, late, 2, 1.0)
            first = threads.submit(splits[0].trunk.own_ends.average)
            second = threads.submit(splits[1].trunk.own_ends.average)
            assert (first.result(WAIT_S).number, second.result(WAIT_S).number) == (2, 2)
            more = [threads.submit(take_step, splits[number], number, 1.0) for number in range(2)]
            for future in (step, *more):
                future.result(WAIT_S)
        assert splits[0].trunk.own_ends.residuals
        told = averaged([*splits, late])
        assert {each.number for each in told} == {3}
        assert {each.members for each in told} == {3}
        assert same_ends(late, splits[0])
        for split in (*splits, late):
            split.close()


def test_a_server_that_is_restarted_is_given_the_ends_again(llama, tmp_path):
    share = ShareSettings("fedex", every=1)
    two = replace(THREE, members=2)
    server = server_of(llama, tmp_path).start()
    port = int(server.address.rpartition(":")[2])
    splits = [member(llama, server, name, share, cohort=two) for name in "ab"]
    trained_apart(splits)
    averaged(splits)
    trained_apart(splits)
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(splits[0].trunk.own_ends.average)
        until = time.monotonic() + WAIT_S
        while not server.engine.runs.do("together", _given).result(WAIT_S):
            assert time.monotonic() < until
            time.sleep(0.01)
        server.stop()
        server = server_of(llama, tmp_path, port).start()
        try:
            assert splits[1].trunk.own_ends.average().number == 2
            assert waits.result(WAIT_S).members == 2
            assert same_ends(*splits)
            for split in splits:
                split.close()
        finally:
            server.stop()


def _given(run: Any) -> bool:
    return bool(run.ends._given)


# ---------------------------------------------------------------- what is given


def given_by(split: PreTrainedModel, **other: Any) -> GivenEnds:
    weights = {name: each.detach().clone() for name, each in split.trunk.own_ends._weights().items()}
    return replace(GivenEnds(1, 1.0, 0, weights), **other)


def key_of(split: PreTrainedModel) -> StepKey:
    return StepKey(run=split.trunk.run.number, incarnation=split.trunk.run.incarnation)


def _not_a_number(weights: Weights) -> Weights:
    return {name: each.index_fill(0, torch.tensor([0]), float("nan")) for name, each in weights.items()}


WRONG: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "no numbers": (_not_a_number, "no finite numbers"),
    "another shape": (lambda weights: {n: each.repeat(1, 2) for n, each in weights.items()}, "one rank"),
    "another rank": (
        lambda weights: {
            n: each.repeat(*((2, 1) if "lora_A" in n else (1, 2))) for n, each in weights.items()
        },
        "rank 4, the run has",
    ),
    "half of a module": (lambda weights: dict(list(weights.items())[:3]), "do not make one adapter"),
    "other modules": (lambda weights: {f"x.{n}": each for n, each in weights.items()}, "of the shapes"),
    "another dtype": (lambda weights: {n: each.half() for n, each in weights.items()}, "float32"),
    "no adapter": (lambda weights: {"head": torch.ones(2, 2)}, "no LoRA weight"),
}


def test_what_cannot_be_averaged_is_refused_and_changes_nothing(llama, tmp_path):
    with members(llama, tmp_path, ShareSettings("fedavg"), "ab", max_adapter_bytes=60_000) as splits:
        trained_apart(splits)
        first, second = (split.trunk.transport for split in splits)
        second.give_ends("together", key_of(splits[1]), given_by(splits[1]))
        good = given_by(splits[0])
        for change, message in WRONG.values():
            with pytest.raises(AdapterError, match=message):
                first.give_ends("together", key_of(splits[0]), replace(good, weights=change(good.weights)))
        for weight in (float("nan"), -1.0, float("inf")):
            with pytest.raises(MessageError, match="must lie between"):
                first.give_ends("together", key_of(splits[0]), replace(good, weight=weight))
        large = {f"{number}.{n}": each for number in range(9) for n, each in good.weights.items()}
        with pytest.raises(MessageError, match="smaller rank"):
            first.give_ends("together", key_of(splits[0]), replace(good, weights=large))
        assert [each.members for each in averaged(splits)] == [2, 2]
        assert same_ends(*splits)


def test_who_asks_twice_counts_once_and_nobody_gives_in_anothers_name(llama, tmp_path):
    with members(llama, tmp_path, ShareSettings("fedavg"), "ab") as splits:
        trained_apart(splits)
        update = [products(split) for split in splits]
        first, second = (split.trunk.transport for split in splits)
        for _ in range(3):
            first.give_ends("together", key_of(splits[0]), given_by(splits[0], weight=SHARES[0]))
        with pytest.raises(RunLost, match="join it again"):
            second.give_ends("together", key_of(splits[0]), given_by(splits[1]))
        with pytest.raises(RunLost, match="join it again"):
            second.take_average("together", key_of(splits[0]), 1, 0)
        a = [dict(split.trunk.own_ends._weights()) for split in splits]
        name = next(name for name in a[0] if "lora_B" in name)
        wanted = (a[0][name] * SHARES[0] + a[1][name] * SHARES[1]).detach() / sum(SHARES[:2])
        assert {each.members for each in averaged(splits)} == {2}
        torch.testing.assert_close(splits[0].trunk.own_ends._weights()[name].detach(), wanted)
        assert apart(products(splits[0]), update[0]) > 1e-3


def test_ends_beyond_the_memory_for_them_are_refused(llama, tmp_path):
    with members(llama, tmp_path, ShareSettings("fedavg"), "ab", max_ends_bytes=20_000) as splits:
        trained_apart(splits)
        size = given_by(splits[0]).nbytes
        assert 10_000 < size <= 20_000
        splits[0].trunk.transport.give_ends("together", key_of(splits[0]), given_by(splits[0]))
        with pytest.raises(ResourceExhausted, match="max_ends_bytes"):
            splits[1].trunk.transport.give_ends("together", key_of(splits[1]), given_by(splits[1]))


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"cohort": None, "member": None}, SettingError, "cohort="),
        ({"full": ["top"]}, SettingError, "trained in full"),
        ({"freeze": ["bottom", "top"]}, SettingError, "train one of them"),
        (
            {"lora": LoraConfig(r=2, target_modules=["q_proj", "lm_head"])},
            AdapterError,
            "a row for each word",
        ),
        ({"lora": LoraConfig(r=2, target_modules="all-linear", use_dora=True)}, AdapterError, "DoRA"),
    ],
)
def test_a_model_whose_ends_cannot_be_averaged_is_not_loaded(llama, tmp_path, how, error, message):
    with server_of(llama, tmp_path) as server, pytest.raises(error, match=message):
        member(llama, server, "a", ShareSettings("fedavg"), **how)


def test_members_with_other_frozen_matrices_are_refused(llama, tmp_path):
    with members(llama, tmp_path, ShareSettings("ffa"), "ab") as splits:
        assert not any("lora_A" in name for name, each in splits[0].named_parameters() if each.requires_grad)
        trained_apart(splits)
        with torch.no_grad():
            next(iter(layers(splits[1]).values())).lora_A[ADAPTER].weight.add_(1e-3)
        ours, theirs = (given_by(each, frozen=each.trunk.own_ends._frozen()) for each in splits)
        splits[0].trunk.transport.give_ends("together", key_of(splits[0]), ours)
        with pytest.raises(AdapterError, match="frozen A"):
            splits[1].trunk.transport.give_ends("together", key_of(splits[1]), theirs)


# ---------------------------------------------------------------- what a member does with it


def test_a_proximal_term_pulls_towards_the_last_average(llama, tmp_path):
    share = ShareSettings("fedavg", every=1, proximal=0.25)
    with members(llama, tmp_path, share, "ab") as splits:
        split = splits[0]
        start = [each.detach().clone() for each in own(split)]
        for towards in (lambda: start, lambda: [each.detach().clone() for each in own(split)]):
            anchor = towards()
            with torch.no_grad():
                for each in own(split):
                    each.add_(torch.randn_like(each))
                    each.grad = torch.randn_like(each)
            before = [each.grad.clone() for each in own(split)]
            split.trunk.own_ends.pull()
            for each, gradient, global_one in zip(own(split), before, anchor, strict=True):
                torch.testing.assert_close(each.grad, gradient + 0.25 * (each.detach() - global_one))
            split.zero_grad()
            trained_apart(splits)
            averaged(splits)
        split.zero_grad(set_to_none=True)
        split.trunk.own_ends.pull()
        assert all(each.grad is None for each in own(split))


def test_what_was_added_to_the_base_is_in_the_exported_adapter(model, tmp_path):
    with members(model, tmp_path / "state", ShareSettings("fedex", every=1), "ab") as splits:
        # Before the second step B is nothing, so A does not move and nothing is lost.
        trained_apart(splits, steps=3)
        averaged(splits)
        split = splits[0].eval()
        split.save_adapter(tmp_path / "adapter")
        whole = PeftModel.from_pretrained(tiny_whole(model), tmp_path / "adapter").eval()
        with torch.no_grad():
            ours, theirs = (each(IDS, use_cache=False).logits for each in (split, whole))
            split.trunk.own_ends.residuals = {}
            split.save_adapter(tmp_path / "without")
            bare = PeftModel.from_pretrained(tiny_whole(model), tmp_path / "without").eval()
            without = bare(IDS, use_cache=False).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert (ours - without).norm() > 50 * (ours - theirs).norm()
