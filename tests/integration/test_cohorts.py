"""Several members train one trunk as one client with all their batches would, whoever is killed meanwhile."""

import importlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from splitlearn.client.split_model import connect
from splitlearn.client.training import plan_run, prepare_training, share_run
from splitlearn.config import BatchingConfig, ClientConfig, RunConfig
from splitlearn.engine.engine import Engine
from splitlearn.engine.run import Run
from splitlearn.errors import AccessDenied, ContributionLost, MessageError, RunLost, SettingError
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.lora import ADAPTER, add_lora, settings_of, weights_of
from splitlearn.model.plan import SplitPlan
from splitlearn.model.weights import load_trunk
from splitlearn.testing import lively_model, tiny_whole
from splitlearn.testing.loopback import SMALL, LoopbackTransport
from splitlearn.vocabulary import CohortSettings, OptimizerSettings

pytestmark = pytest.mark.timeout(300)

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WAIT_S, RATE, STEPS = 60, 1e-2, 10
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
TRUNK = ("layers.2.", "layers.3.")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model("llama", tmp_path_factory.mktemp("model"))


def batch(member: int, step: int) -> Tensor:
    """Each member's rows have a length of their own, so that token counts differ."""
    draw = torch.Generator().manual_seed(1000 * member + step)
    return torch.randint(3, 128, (2, 5 + 4 * member), generator=draw)


def loss_sum(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, int]:
    """Over the tokens that are predicted, and how many they are."""
    count = ids[:, 1:].numel()
    return model(ids, labels=ids, use_cache=False).loss * count, count


@contextmanager
def members(
    folder: Path, cohort: CohortSettings, names: Sequence[str], runs: RunConfig | None = None
) -> Iterator[list[PreTrainedModel]]:
    """Clients of one engine, each with a transport of its own, bottom and top frozen."""
    checkpoint = Checkpoint.open(folder)
    plan = SplitPlan.for_config(checkpoint.config)
    engine = Engine(load_trunk(checkpoint, plan), BatchingConfig(), SMALL, runs)
    engine.start()
    try:
        yield [member_of(checkpoint, plan, engine, cohort, name) for name in names]
    finally:
        engine.stop()


def member_of(
    checkpoint: Checkpoint, plan: SplitPlan, engine: Engine, cohort: CohortSettings, name: str
) -> PreTrainedModel:
    split = connect(checkpoint, plan, LoopbackTransport(engine, SMALL), ClientConfig())
    prepare_training(split, LORA, "together", ("bottom", "top"), seed=0)
    share_run(split, cohort, name)
    plan_run(split.trunk, OptimizerSettings(learning_rate=RATE))
    return split.train()


def trunk_of(split: PreTrainedModel) -> dict[str, Tensor]:
    engine = split.trunk.transport._engine
    return dict(engine.runs.do("together", Run.snapshot).result(WAIT_S).weights)


def train_together(splits: Sequence[PreTrainedModel], steps: int, *, weighs: bool = True) -> None:
    def train(member: int) -> None:
        for step in range(steps):
            loss, count = loss_sum(splits[member], batch(member, step))
            (loss / count).backward()
            splits[member].trunk.step(learning_rate=RATE, weight=count if weighs else 1.0)

    with ThreadPoolExecutor(len(splits)) as threads:
        for future in [threads.submit(train, member) for member in range(len(splits))]:
            future.result(WAIT_S)


def train_alone(folder: Path, clients: int, steps: int) -> PreTrainedModel:
    """One client with the union batch: the loss is the mean over all tokens."""
    whole = tiny_whole(folder)
    add_lora(whole, settings_of(LORA, "llama"), ADAPTER, seed=0)
    for name, weight in whole.named_parameters():
        weight.requires_grad_("lora_" in name and any(layer in name for layer in TRUNK))
    trained = [weight for weight in whole.train().parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    for step in range(steps):
        losses, counts = zip(
            *(loss_sum(whole, batch(member, step)) for member in range(clients)), strict=True
        )
        (sum(losses) / sum(counts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole


def off_by(ours: dict[str, Tensor], whole: PreTrainedModel, first: dict[str, Tensor]) -> float:
    """The distance of two updates, over the norm of the whole model's."""
    theirs = {name: weight.detach() for name, weight in weights_of(whole, ADAPTER).items() if name in ours}
    assert theirs.keys() == ours.keys()
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours])
    moved = torch.cat([(theirs[name] - first[name]).flatten() for name in ours])
    return float(apart.norm() / moved.norm())


@pytest.mark.parametrize(
    "clients", [2, 3, pytest.param(5, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.slow)]
)
def test_sync_is_one_client_with_the_union_batch(model, clients):
    names = [f"m{number}" for number in range(clients)]
    whole = train_alone(model, clients, STEPS)
    found = {}
    for weighting in ("tokens", "equal"):
        cohort = CohortSettings("sync", members=clients, weighting=weighting)
        with members(model, cohort, names) as splits:
            splits[0].trunk.run.leave()  # opens it, so that its first weights can be seen
            splits[0].trunk._run = None
            first = trunk_of(splits[0])
            train_together(splits, STEPS, weighs=weighting == "tokens")
            found[weighting] = off_by(trunk_of(splits[0]), whole, first)
    assert found["tokens"] <= 1e-3
    assert found["equal"] > 1e-3, "a mean of the clients' means would do as well"


@pytest.mark.parametrize("clients", [2, 5])
def test_the_first_rounds_gradient_is_that_of_the_union_batch(model, clients):
    """With plain SGD the update is the gradient."""
    names = [f"m{number}" for number in range(clients)]
    cohort = CohortSettings("sync", members=clients)
    whole = tiny_whole(model)
    add_lora(whole, settings_of(LORA, "llama"), ADAPTER, seed=0)
    losses, counts = zip(*(loss_sum(whole.train(), batch(each, 0)) for each in range(clients)), strict=True)
    (sum(losses) / sum(counts)).backward()
    expected = {name: weight.grad for name, weight in weights_of(whole, ADAPTER).items()}
    with members(model, cohort, names) as splits:
        for split in splits:
            plan_run(split.trunk, OptimizerSettings("sgd", learning_rate=1.0))
        engine = splits[0].trunk.transport._engine
        before = {}

        def note(run: Run) -> None:
            before.update({name: each.detach().clone() for name, each in run.masters.items()})

        _ = splits[0].trunk.run
        engine.runs.do("together", note).result(WAIT_S)

        def train(member: int) -> None:
            loss, count = loss_sum(splits[member], batch(member, 0))
            (loss / count).backward()
            splits[member].trunk.step(learning_rate=1.0, weight=count)

        with ThreadPoolExecutor(clients) as threads:
            list(threads.map(train, range(clients)))
        moved = {name: before[name] - weight for name, weight in trunk_of(splits[0]).items()}
    apart = torch.cat([(moved[name] - expected[name]).flatten() for name in moved])
    size = torch.cat([expected[name].flatten() for name in moved])
    assert float(apart.norm() / size.norm()) <= 1e-5


def test_members_agree_on_the_cohort_and_each_has_a_name_of_its_own(model):
    cohort = CohortSettings("async", members=2)
    with members(model, cohort, ["a", "a"]) as (first, second):
        _ = first.trunk.run
        with pytest.raises(AccessDenied, match="another key"):
            _ = second.trunk.run
        share_run(second, replace(cohort, staleness_exponent=1.0), "b")
        with pytest.raises(SettingError, match="staleness_exponent"):
            _ = second.trunk.run
        share_run(second, cohort, "b")
        facts = second.trunk.transport.run_facts("together")
        assert (facts.active_members, facts.known_members) == (1, 1)
        assert facts.members == (), "a stranger is told no names"
        assert facts.number == 0, "a stranger is told no number"
        _ = second.trunk.run
        with pytest.raises(MessageError, match="together is trained by 2 of its members"):
            first.trunk.transport.close_run("together")
        for split in (first, second):
            split.trunk.close_run()
        with pytest.raises(RunLost, match="has left"):
            first.trunk.transport.renew_member("together", 1)
        first.trunk.transport.close_run("together")


def state_of(split: PreTrainedModel, name: str) -> str:
    facts = split.trunk.transport.run_facts("together")
    return next(each.state for each in facts.members if each.name == name)


def test_who_has_left_may_look_and_is_waited_for_again_with_its_next_step(model):
    with members(model, CohortSettings("sync", members=2), ["a", "b"]) as (first, second):
        train_together((first, second), 1)
        first.trunk.leave()
        train_together((second,), 1)
        with torch.no_grad():
            first.eval()(batch(0, 0), use_cache=False)
        assert state_of(second, "a") == "left"
        train_together((second,), 1)
        first.train()(batch(0, 0), labels=batch(0, 0), use_cache=False).loss.backward()
        assert state_of(second, "a") == "active"
        first.trunk.leave()


def test_a_step_whose_first_microbatch_was_lost_begins_anew_with_it(model):
    with members(model, CohortSettings("sync", members=1), ["a"]) as (split,):
        first, second = batch(0, 0), batch(1, 0)
        run, engine = split.trunk.run, split.trunk.transport._engine
        run.accumulation = 2
        split(first, labels=first, use_cache=False).loss.backward()

        def lapse(run: Run) -> None:
            run.of_cohort().members["a"].lease_until = 0.0
            run.of_cohort().tick(1.0)

        engine.runs.do("together", lapse).result(WAIT_S)
        with pytest.raises(ContributionLost):
            split(second, labels=second, use_cache=False)
        for ids in (first, second):
            split(ids, labels=ids, use_cache=False).loss.backward()
        assert split.trunk.step().round == 1
        assert run.unapplied == 0


def test_a_private_run_has_no_members(model):
    with members(model, CohortSettings(), [None]) as (split,):
        _ = split.trunk.run
        with pytest.raises(RunLost, match="private"):
            split.trunk.transport.leave_run("together")
    with members(model, CohortSettings(), []), pytest.raises(SettingError, match="no members"):
        share_run(split, None, "a")


# ---------------------------------------------------------------- real processes, killed


@pytest.fixture(scope="module")
def cohort_kill() -> Iterator[ModuleType]:
    """The benchmark with ten members and hundreds of steps; here they are few."""
    if not BENCHMARKS.is_dir():
        pytest.skip("benchmarks/ is not here")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("cohort_kill")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["sync", "quorum", "carry", "async", "buffered"])
def test_a_killed_cohorts_ledger_makes_the_same_adapter_bit_for_bit(cohort_kill, model, tmp_path, rule):
    found = cohort_kill.disturbed(model, tmp_path, cohort_kill.rules(3)[rule], members=3, steps=12)
    assert found["errors"] == {}
    assert found["wrong"] == []
    assert found["replayed_equal"]
    assert not found["other_weights_equal"], "or any weights would do"
