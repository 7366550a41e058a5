"""With share="sync" a cohort trains bottom, trunk and top as one client with all its batches would."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from splitlearn import AutoSplitModelForCausalLM, SplitTrainer, TrunkServer
from splitlearn.client.split_model import connect
from splitlearn.client.training import clip_grad_norm, plan_run, prepare_training, share_run
from splitlearn.config import BatchingConfig, ClientConfig
from splitlearn.engine.contribution import Gradients
from splitlearn.engine.engine import Engine
from splitlearn.engine.ledger import read
from splitlearn.engine.run import Run
from splitlearn.engine.trunk_state import AdapterVersion
from splitlearn.errors import ContributionLost, MessageError, SettingError, StaleGradient
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.lora import ADAPTER, weights_of
from splitlearn.model.plan import SplitPlan
from splitlearn.model.weights import load_trunk
from splitlearn.monitor.events import Event, RoundClosed
from splitlearn.testing import lively_model
from splitlearn.testing.loopback import SMALL, LoopbackTransport
from splitlearn.testing.replay import replay
from splitlearn.vocabulary import CohortSettings, OptimizerSettings, Phase
from splitlearn.wire.messages import RunStepMessage

pytestmark = pytest.mark.timeout(300)

WAIT_S, RATE, STEPS = 60, 1e-2, 10
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
ADAMW = OptimizerSettings(learning_rate=RATE, weight_decay=0.1)
SGD = OptimizerSettings("sgd", learning_rate=1.0)
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model("llama", tmp_path_factory.mktemp("model"))


def batch(member: int, step: int) -> Tensor:
    """Each member's rows have a length of their own, so that token counts differ."""
    draw = torch.Generator().manual_seed(1000 * member + step)
    return torch.randint(3, 128, (2, 5 + 4 * member), generator=draw)


class Place:
    """One engine, and the clients that are made to reach it."""

    def __init__(self, folder: Path) -> None:
        self._checkpoint = Checkpoint.open(folder)
        self._plan = SplitPlan.for_config(self._checkpoint.config)
        self.engine = Engine(load_trunk(self._checkpoint, self._plan), BatchingConfig(), SMALL)

    def client(self, optimizer: OptimizerSettings = ADAMW, freeze: Sequence[str] = ()) -> PreTrainedModel:
        transport = LoopbackTransport(self.engine, SMALL)
        split = connect(self._checkpoint, self._plan, transport, ClientConfig())
        prepare_training(split, LORA, "together", freeze, seed=0)
        plan_run(split.trunk, optimizer)
        return split.train()

    def member(self, name: str, cohort: CohortSettings, **how) -> PreTrainedModel:
        split = self.client(**how)
        share_run(split, cohort, name, "sync")
        return split

    def weights(self) -> Weights:
        return dict(self.engine.runs.do("together", Run.snapshot).result(WAIT_S).weights)


@contextmanager
def place(folder: Path) -> Iterator[Place]:
    place = Place(folder)
    place.engine.start()
    try:
        yield place
    finally:
        place.engine.stop()


def ends_of(split: PreTrainedModel) -> Weights:
    return {name: weight.detach().clone() for name, weight in weights_of(split, ADAPTER).items()}


def same(ours: Weights, theirs: Weights) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def give(split: PreTrainedModel, member: int, step: int, rate: float = RATE, *, weighs: bool = True):
    """One step; computed again where the cohort says so."""
    ids = batch(member, step)
    for _ in range(5):
        split.zero_grad()
        try:
            split(ids, labels=ids, use_cache=False).loss.backward()
            return split.trunk.step(learning_rate=rate, weight=float(ids[:, 1:].numel()) if weighs else 1.0)
        except (ContributionLost, StaleGradient):
            continue
    raise AssertionError("five tries")


def together(splits: Sequence[PreTrainedModel], steps: range, **how) -> None:
    """Rounds of `sync`; after each all members have the same bottom and top, bit for bit."""
    for step in steps:
        with ThreadPoolExecutor(len(splits)) as threads:
            done = [threads.submit(give, split, at, step, **how) for at, split in enumerate(splits)]
            assert {each.result(WAIT_S).round for each in done} == {step + 1}
        assert all(same(ends_of(splits[0]), ends_of(split)) for split in splits[1:])


def alone(folder: Path, clients: int, steps: int, optimizer: OptimizerSettings) -> tuple[Weights, Weights]:
    """One ordinary client with the union batch: the adapter of all three parts, before and after."""
    with place(folder) as here:
        split = here.client(optimizer)
        split.trunk.run.accumulation = clients
        ours = [weight for weight in split.parameters() if weight.requires_grad]
        if optimizer.name == "sgd":
            local: torch.optim.Optimizer = torch.optim.SGD(ours, lr=optimizer.learning_rate)
        else:
            local = torch.optim.AdamW(ours, lr=RATE, weight_decay=optimizer.weight_decay, fused=True)
        before = {**ends_of(split), **here.weights()}
        for step in range(steps):
            batches = [batch(member, step) for member in range(clients)]
            total = sum(ids[:, 1:].numel() for ids in batches)
            for ids in batches:
                share = ids[:, 1:].numel() / total
                (split(ids, labels=ids, use_cache=False).loss * share).backward()
            split.trunk.step()
            local.step()
            local.zero_grad()
        return before, {**ends_of(split), **here.weights()}


def off_by(ours: Weights, before: Weights, after: Weights) -> float:
    """The distance of two updates of all three parts, over the norm of the one client's."""
    assert ours.keys() == after.keys()
    apart = torch.cat([(ours[name] - after[name]).flatten() for name in after])
    moved = torch.cat([(after[name] - before[name]).flatten() for name in after])
    return float(apart.norm() / moved.norm())


CLIENTS = [2, 3, pytest.param(5, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.slow)]


@pytest.mark.parametrize("clients", CLIENTS)
def test_all_three_parts_move_as_one_client_with_the_union_batch_moves_them(model, clients):
    before, after = alone(model, clients, STEPS, ADAMW)
    found = {}
    for weighting in ("tokens", "equal"):
        cohort = CohortSettings("sync", members=clients, weighting=weighting)
        with place(model) as here:
            splits = [here.member(f"m{number}", cohort) for number in range(clients)]
            together(splits, range(STEPS), weighs=weighting == "tokens")
            assert same(ends_of(splits[0]), here.weights()), "the members have what the run has"
            found[weighting] = off_by(here.weights(), before, after)
    print("off by", clients, found)
    assert found["tokens"] <= 1e-3
    assert found["equal"] > 1e-3, "a mean of the clients' means would do as well"


@pytest.mark.parametrize("clients", [2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_the_first_rounds_gradient_is_that_of_the_union_batch(model, clients):
    """With plain SGD at a rate of 1 the update is the gradient."""
    before, after = alone(model, clients, 1, SGD)
    with place(model) as here:
        cohort = CohortSettings("sync", members=clients)
        splits = [here.member(f"m{number}", cohort, optimizer=SGD) for number in range(clients)]
        together(splits, range(1), rate=1.0)
        assert off_by(here.weights(), before, after) <= 1e-5


def test_the_round_clips_bottom_trunk_and_top_by_one_norm(model):
    before, after = alone(model, 2, 1, SGD)
    norm = torch.cat([(after[name] - before[name]).flatten() for name in after]).norm()
    with place(model) as here:
        cohort = CohortSettings("sync", members=2, clip_norm=float(norm) / 4)
        together([here.member(name, cohort, optimizer=SGD) for name in "ab"], range(1), rate=1.0)
        clipped = {name: before[name] + (after[name] - before[name]) / 4 for name in after}
        assert off_by(here.weights(), before, clipped) <= 1e-4


def test_a_members_own_clipping_leaves_what_the_round_clips(model):
    cohort, ids = CohortSettings("sync", members=1), batch(0, 0)
    for share, scaled in (("personal", True), ("sync", False)):
        with place(model) as here:
            split = here.client()
            share_run(split, cohort, "a", share)
            split(ids, labels=ids, use_cache=False).loss.backward()
            before = [each.grad.clone() for each in split.parameters() if each.grad is not None]
            assert clip_grad_norm(split, 1e-3) > 1e-3
            after = [each.grad for each in split.parameters() if each.grad is not None]
            assert scaled != all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert split.trunk.gradient_scale == 1.0, "the trunk's mean is the round's to clip"
            split.close()


def test_who_joins_late_and_whose_own_optimizer_steps_has_the_runs_ends(model):
    cohort = CohortSettings("sync", members=1)
    with place(model) as here:
        first = here.member("a", cohort)
        together([first], range(2))
        late = here.member("b", cohort)
        drawn = ends_of(late)
        _ = late.trunk.run
        assert same(ends_of(late), ends_of(first))
        assert not same(ends_of(late), drawn)
        together([first, late], range(2, 4))
        local = torch.optim.AdamW([each for each in late.parameters() if each.requires_grad], lr=1.0)
        local.step()
        assert same(ends_of(late), ends_of(first)), "it has no gradients to step with"
        for split in (first, late):
            split.close()


def test_a_step_with_ends_of_another_version_is_computed_again_with_the_runs(model):
    """Members of `async` overtake each other; each step is computed at one version of all three parts."""
    with place(model) as here:
        a, b = (here.member(name, CohortSettings("async", members=1)) for name in "ab")
        _ = a.trunk.run, b.trunk.run
        assert give(a, 0, 0).staleness == 0
        merged = give(b, 1, 0)
        assert merged.staleness == 1, "b began with the ends that it was given when it joined"
        b.trunk.run.ends_version = 0
        ids = batch(1, 1)
        with pytest.raises(ContributionLost, match="fetch them"):
            b(ids, labels=ids, use_cache=False)
        assert give(b, 1, 1).staleness == 0
        assert same(ends_of(b), here.weights())


def test_gradients_that_are_no_numbers_and_names_that_are_not_there_change_nothing(model):
    with place(model) as here:
        split = here.member("a", CohortSettings("sync", members=1))
        _ = split.trunk.run
        before = here.weights()
        ids = batch(0, 0)
        split(ids, labels=ids, use_cache=False).loss.backward()
        next(each for each in split.parameters() if each.grad is not None).grad[0, 0] = float("inf")
        split.trunk.step()
        assert same(here.weights(), before)
        run = split.trunk.run
        asked = RunStepMessage(run._key(Phase.ENDS), ends={"lora_A": torch.ones(2, 2)})
        assert set(split.trunk.transport.run_step(asked).ends) <= set(before), "they are taken once"
        give(split, 0, 1)
        assert not same(here.weights(), before)


def test_what_cannot_be_shared_is_said(model):
    cohort = CohortSettings("sync", members=1)
    with place(model) as here:
        with pytest.raises(SettingError, match="both are frozen"):
            here.member("a", cohort, freeze=("bottom", "top"))
        with pytest.raises(SettingError, match="cohort"):
            share_run(here.client(), None, None, "sync")
        with pytest.raises(SettingError, match="no share rule"):
            share_run(here.client(), cohort, "a", "nothing")
        one = here.member("a", cohort)
        _ = one.trunk.run
        other = here.client()
        share_run(other, cohort, "b")
        with pytest.raises(SettingError, match="rule: sync, not personal"):
            _ = other.trunk.run
        frozen = here.member("b", cohort, freeze=("bottom",))
        with pytest.raises(SettingError, match="other weights of bottom and top"):
            _ = frozen.trunk.run
        personal = here.client()
        share_run(personal, cohort, "c")
        personal.trunk.planned = replace(personal.trunk.planned, name="apart")
        key = personal.trunk.run._key(Phase.ENDS)
        with pytest.raises(MessageError, match="leaves bottoms and tops"):
            personal.trunk.transport.run_step(RunStepMessage(key))
        for split in (one, other, frozen, personal):
            split.close()


# ---------------------------------------------------------------- over the wire, on the disk, again


def served(folder: Path, state: Path, port: int = 0) -> TrunkServer:
    sessions = {"session_tokens": 64, "kv_budget_bytes": 1 << 20}
    return TrunkServer(
        folder, port=port, device="cpu", dtype="float32", state_dir=state, drain_s=0.1, sessions=sessions
    ).start()


def caller(folder: Path, address: str, cohort: CohortSettings, name: str) -> PreTrainedModel:
    split = AutoSplitModelForCausalLM.from_pretrained(
        folder, trunk=address, lora=LORA, run="together", cohort=cohort, member=name, share="sync"
    )
    plan_run(split.trunk, ADAMW)
    return split.train()


def replayed(folder: Path, events: Sequence[Event], cohort: CohortSettings) -> Weights:
    """The adapter of all three parts that this ledger makes, computed again in this process."""
    with place(folder) as here:
        split = here.client()
        name = split.trunk.run.name
        taken = here.engine.runs.do(name, Run.snapshot).result(WAIT_S)
        ends = weights_of(split, ADAPTER)
        settings = replace(taken.settings, cohort=cohort)
        run = Run(name, settings, None, {key: each.clone() for key, each in taken.weights.items()}, b"")
        run.take_ends({key: ends[key].detach() for key in sorted(ends)})

        def gradients_of(member: str, step: int, version: AdapterVersion) -> Gradients:
            trunk = {key: each.detach() for key, each in version.weights.items()}
            snapshot = replace(taken, weights=trunk, step=step - 1)
            here.engine.runs.do(name, lambda run: run.restore(snapshot)).result(WAIT_S)
            with torch.no_grad():
                for key, value in version.ends.items():
                    ends[key].copy_(value)
            split.zero_grad()
            ids = batch(int(member[1:]), step)
            split.trunk.run.step = step - 1
            split(ids, labels=ids, use_cache=False).loss.backward()
            found = here.engine.runs.do(name, Run.gradients).result(WAIT_S)
            split.trunk.run._next_microbatch = split.trunk.run._unapplied = 0
            return [*found.values(), *(ends[key].grad for key in sorted(ends))]

        replay(events, run, gradients_of)
        return dict(run.snapshot().weights)


RULES = {
    "sync": CohortSettings("sync", members=2, clip_norm=0.5),
    "buffered": CohortSettings("buffered", members=2, buffer=2),
}


@pytest.mark.parametrize("rule", RULES)
def test_after_a_restart_members_go_on_and_the_ledger_makes_the_same_ends_bit_for_bit(model, tmp_path, rule):
    cohort = RULES[rule]
    server = served(model, tmp_path)
    splits = [caller(model, server.address, cohort, f"m{number}") for number in range(2)]
    try:
        several(splits, range(1, 4))
        server.stop()
        server = served(model, tmp_path, int(server.address.rpartition(":")[2]))
        several(splits, range(4, 6))
        splits.append(caller(model, server.address, cohort, "m2"))
        _ = splits[2].trunk.run
        several(splits[:2], range(6, 7)) if rule == "buffered" else several(splits, range(6, 7), late=1)
        for split in splits:
            split.trunk.refresh_ends(anew=True)
        assert all(same(ends_of(splits[0]), ends_of(split)) for split in splits[1:])
    finally:
        for split in splits:
            split.close()
        server.stop()
    store = server._hall.runs
    kept = store.read("together", store.steps("together")[-1]).weights
    assert same(ends_of(splits[0]), kept)
    events = list(read(store.ledger("together")))
    assert sum(isinstance(each, RoundClosed) for each in events) == 6
    assert same(kept, replayed(model, events, cohort))
    assert not same(kept, replayed(model, altered(events), cohort)), "or any weights would do"


def several(splits: Sequence[PreTrainedModel], steps: range, late: int = 0) -> None:
    """Each member's own steps; the last one has begun so many rounds later."""

    def train(at: int) -> None:
        for step in steps:
            give(splits[at], at, step - 5 * late * (at == 2))

    with ThreadPoolExecutor(len(splits)) as threads:
        for each in [threads.submit(train, at) for at in range(len(splits))]:
            each.result(WAIT_S)


def altered(events: Sequence[Event]) -> list[Event]:
    """One coefficient of the first round is a little off."""
    at = next(at for at, each in enumerate(events) if isinstance(each, RoundClosed))
    first, *rest = events[at].parts
    parts = (replace(first, coefficient=first.coefficient * 1.01), *rest)
    return [*events[:at], replace(events[at], parts=parts), *events[at + 1 :]]


def test_ends_that_all_train_together_have_no_rate_of_their_own(model, tmp_path):
    """Those that a member averages are its own until then: they may."""
    arguments, cohort = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), CohortSettings("sync")
    with place(model) as here:
        own, shared = here.client(), here.member("b", cohort)
        share_run(own, cohort, "a", "fedavg")
        SplitTrainer(own, arguments, learning_rates={"bottom": 1e-3})
        with pytest.raises(SettingError, match="one rate for all"):
            SplitTrainer(shared, arguments, learning_rates={"bottom": 1e-3})
        for split in (own, shared):
            split.close()
