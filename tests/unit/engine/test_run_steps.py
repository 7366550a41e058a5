"""A run's steps give what autograd on the same trunk gives, whatever happens between forward and backward."""

import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedModel

from splitlearn.config import RunConfig
from splitlearn.engine.adapter_table import AdapterTable
from splitlearn.engine.run import Run
from splitlearn.engine.run_steps import RunSteps
from splitlearn.engine.run_table import RunTable
from splitlearn.engine.tape import Tape
from splitlearn.engine.trunk_state import BARE, TrunkState
from splitlearn.errors import (
    MessageError,
    ResourceExhausted,
    RunBroken,
    RunLost,
    StaleGradient,
    StepOutOfOrder,
    TapeExpired,
)
from splitlearn.model.lora import config_of, weights_of
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.testing.tiny import tiny_config
from splitlearn.vocabulary import (
    LoraSettings,
    OptimizerSettings,
    Phase,
    Precision,
    RunSettings,
    StepKey,
    TapeSettings,
)
from splitlearn.wire.messages import AnswerMessage, OpenRun, OptimizerStep, RunStepMessage

ME, YOU = b"me", b"you"
HIDDEN, LEASE_S, GIB = 32, 100.0, 1 << 30
SEED = 77
LORA = LoraSettings(r=4, alpha=8.0, target_modules=("q_proj", "v_proj", "down_proj"))
OTHER = LoraSettings(r=2, alpha=4.0, target_modules=("all-linear",), use_rslora=True)
DROPS = replace(LORA, dropout=0.3)


def trunk_of(whole: PreTrainedModel) -> TrunkSegment:
    return TrunkSegment.of_whole(whole, SplitPlan(6, 2, 2)).eval()


@pytest.fixture(scope="module")
def whole() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config("llama")).eval()


def values(seed: int, rows: int = 2, tokens: int = 5) -> Tensor:
    return torch.randn(rows, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


X, Y, UP, DOWN = (values(seed) for seed in (1, 2, 3, 4))
"""Two activations at the lower cut, two gradients at the upper cut."""


class Desk:
    """One engine's training part without its thread, and a client that asks."""

    def __init__(self, whole: PreTrainedModel, budget: int = GIB, staleness_limit: int = 1) -> None:
        self.trunk = trunk_of(whole)
        self.state = TrunkState(self.trunk)
        self.tape = Tape(budget)
        self.table = RunTable(self.state, self.tape, RunConfig(), AdapterTable(self.state, 4))
        self.steps = RunSteps(
            self.trunk, self.state, self.tape, lease_s=LEASE_S, staleness_limit=staleness_limit
        )

    def open(self, name: str = "notes", lora: LoraSettings = LORA, **settings) -> Run:
        """A run whose weights are all random: with B at zero A would get no gradient."""
        run = self.table.open(ME, OpenRun(name, RunSettings(lora=lora, **settings))).run
        snapshot = run.snapshot()
        generator = torch.Generator().manual_seed(len(name))
        weights = {
            key: 0.2 * torch.randn(weight.shape, generator=generator)
            for key, weight in snapshot.weights.items()
        }
        run.restore(replace(snapshot, weights=weights))
        return run

    def ask(self, run: Run, phase: Phase, tensor: Tensor | None = None, **fields) -> AnswerMessage:
        key = StepKey(
            run=run.owner.number,
            incarnation=fields.pop("incarnation", run.owner.incarnation),
            step=fields.pop("step", run.owner.next_step),
            microbatch=fields.pop("microbatch", 0),
            phase=phase,
        )
        return self.steps.do(self.table.find(run.client, key), RunStepMessage(key, tensor, **fields))

    def forward(self, run: Run, activation: Tensor = X, **fields) -> Tensor:
        return self.ask(run, Phase.FORWARD, activation, **fields).activation_BTD

    def backward(self, run: Run, gradient: Tensor = UP, **fields) -> Tensor | None:
        return self.ask(run, Phase.BACKWARD, gradient, **fields).activation_BTD

    def evaluate(self, run: Run, activation: Tensor = X, **fields) -> Tensor:
        return self.ask(run, Phase.EVALUATE, activation, **fields).activation_BTD

    def apply(self, run: Run, rate: float = 0.1, **fields) -> AnswerMessage:
        return self.ask(run, Phase.OPTIMIZER_STEP, optimizer=OptimizerStep(1.0, rate), **fields)

    def train(self, run: Run, *activations: Tensor) -> None:
        for activation in activations:
            self.forward(run, activation, seed=SEED)
            self.backward(run)
            self.apply(run)


@pytest.fixture
def desk(whole: PreTrainedModel) -> Iterator[Desk]:
    made = Desk(whole)
    base = {name: tensor.clone() for name, tensor in made.trunk.state_dict().items()}
    yield made
    for name in [run.name for run in made.table]:
        made.table.close(name)
    left = {name.replace(".base_layer", ""): tensor for name, tensor in made.trunk.state_dict().items()}
    assert left.keys() == base.keys()
    assert all(torch.equal(left[name], base[name]) for name in base), "no run writes into the base"


@dataclass
class Given:
    """What one forward and its backward give."""

    output: Tensor
    below: Tensor | None
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Given)
        assert (self.below is None) == (other.below is None)
        return (
            torch.equal(self.output, other.output)
            and (self.below is None or torch.equal(self.below, other.below))
            and same(self.gradients, other.gradients)
        )


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def gradients_of(run: Run) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in run.gradients().items() if each is not None}


def weights_now(run: Run) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in run.current.weights.items()}


def alone(
    whole: PreTrainedModel,
    lora: LoraSettings,
    weights: Mapping[str, Tensor],
    activation: Tensor = X,
    gradient: Tensor = UP,
    *,
    seed: int = 0,
    **how: Tensor,
) -> Given:
    """The reference: a trunk of its own with PEFT's one adapter, and autograd."""
    trunk = trunk_of(whole)
    inject_adapter_in_model(config_of(lora), trunk.causal_lm, "default")
    adapter = weights_of(trunk.causal_lm, "default")
    for name, weight in adapter.items():
        weight.data.copy_(weights[name])
    below = activation.clone().requires_grad_()
    rows, tokens = activation.shape[:2]
    how = {"position_ids": torch.arange(tokens).expand(rows, tokens)} | how
    trunk.train(bool(seed))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = trunk(below, **how)
    output.backward(gradient)
    found = {name: each.grad for name, each in adapter.items() if each.grad is not None}
    return Given(output.detach(), below.grad, found)


def asked(desk: Desk, run: Run, activation: Tensor = X, gradient: Tensor = UP, **fields) -> Given:
    output = desk.forward(run, activation, **fields)
    fields.pop("seed", None)
    below = desk.backward(run, gradient, **fields)
    return Given(output, below, gradients_of(run))


# ---------------------------------------------------------------- one forward, one backward


@pytest.mark.parametrize("lora", [LORA, OTHER, replace(LORA, use_dora=True)], ids=["some", "all", "dora"])
def test_a_forward_and_its_backward_give_what_autograd_gives(desk, whole, lora):
    run = desk.open(lora=lora)
    given = asked(desk, run)
    assert given == alone(whole, lora, weights_now(run))
    assert len(given.gradients) == len(run.masters)
    assert (len(desk.tape), desk.tape.bytes) == (0, X.nbytes), "the answer alone, for who lost it"


def test_dropout_drops_what_its_seed_says_and_leaves_other_random_numbers_alone(desk, whole):
    run = desk.open(lora=DROPS)
    before = torch.random.get_rng_state()
    given = asked(desk, run, seed=SEED)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert given == alone(whole, DROPS, weights_now(run), seed=SEED)


def test_microbatches_of_other_seeds_drop_otherwise(desk):
    run = desk.open(lora=DROPS)
    outputs = [desk.forward(run, seed=seed, microbatch=seed) for seed in (1, 2, 3, 0)]
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 4
    assert torch.equal(outputs[3], desk.evaluate(run)), "without a seed nothing is dropped"


def test_padding_and_positions_reach_the_trunk(desk, whole):
    run = desk.open()
    mask = torch.tensor([[False, False, True, True, True], [True] * 5])
    positions = torch.tensor([[0, 0, 0, 1, 2], [3, 4, 5, 6, 7]])
    output = desk.forward(run, mask_columns_BT=mask, positions_BT=positions)
    given = Given(output, desk.backward(run), gradients_of(run))
    expected = alone(whole, LORA, weights_now(run), attention_mask=mask.long(), position_ids=positions)
    assert given == expected
    assert not torch.equal(desk.evaluate(run), output)


def test_below_a_frozen_bottom_no_gradient_is_sent_and_the_trunks_are_the_same(desk, whole):
    run = desk.open()
    expected = alone(whole, LORA, weights_now(run))
    given = asked(desk, run, want_input_gradient=False)
    assert given == replace(expected, below=None)


def test_a_run_without_weights_passes_gradients_through_and_counts_its_steps(desk, whole):
    run = desk.table.open(ME, OpenRun("bare", RunSettings(lora=LoraSettings(r=0)))).run
    expected = alone(
        whole, LORA, {name: torch.zeros_like(each) for name, each in desk.open().masters.items()}
    )
    assert asked(desk, run) == replace(expected, gradients={})
    assert desk.backward(run, microbatch=0) is not None, "and answers a repeated one"
    desk.forward(run, microbatch=1, want_input_gradient=False)
    assert desk.backward(run, microbatch=1, want_input_gradient=False) is None
    assert desk.ask(run, Phase.GRADIENT_NORMS).norms.shape == (0,)
    assert desk.apply(run).versions.version == 0
    assert run.step == 1


def test_the_loss_scale_is_taken_out_of_the_trunks_gradients_alone(desk):
    plain, scaled = (desk.open(name) for name in ("notes", "other"))
    expected = asked(desk, plain)
    output = desk.forward(scaled)
    below = desk.backward(scaled, UP * 1024, loss_scale=1024.0)
    assert Given(output, below, gradients_of(scaled)) == replace(expected, below=expected.below * 1024)


def test_norms_are_those_of_what_was_accumulated(desk, whole):
    run = desk.open()
    assert desk.ask(run, Phase.GRADIENT_NORMS).norms.tolist() == [-1.0] * len(run.masters)
    given = asked(desk, run)
    expected = torch.stack(torch._foreach_norm(list(given.gradients.values()), 2.0))
    assert torch.equal(desk.ask(run, Phase.GRADIENT_NORMS).norms, expected)
    with pytest.raises(StepOutOfOrder):
        desk.ask(run, Phase.GRADIENT_NORMS, step=2)


# ---------------------------------------------------------------- several at once


def test_a_batch_of_microbatches_adds_up_as_autograd_adds(desk, whole):
    run = desk.open()
    weights = weights_now(run)
    desk.forward(run, X, microbatch=0)
    desk.forward(run, Y, microbatch=1)
    desk.backward(run, UP, microbatch=0)
    desk.backward(run, DOWN, microbatch=1)
    first, second = alone(whole, LORA, weights, X, UP), alone(whole, LORA, weights, Y, DOWN)
    assert same(gradients_of(run), {name: first.gradients[name] + second.gradients[name] for name in weights})


@pytest.mark.parametrize("tape", [TapeSettings(), TapeSettings(True), TapeSettings(False, 1)], ids=str)
def test_a_forward_of_another_run_in_between_changes_neither(desk, whole, tape):
    one, two = desk.open("notes", DROPS, tape=tape), desk.open("letters", OTHER)
    expected = {
        "one": alone(whole, DROPS, weights_now(one), X, UP, seed=SEED),
        "two": alone(whole, OTHER, weights_now(two), Y, DOWN),
    }
    first, second = desk.forward(one, X, seed=SEED), desk.forward(two, Y)
    given = Given(first, desk.backward(one, UP), gradients_of(one))
    assert given == expected["one"]
    assert Given(second, desk.backward(two, DOWN), gradients_of(two)) == expected["two"]


def test_with_pefts_set_adapter_alone_the_first_run_would_get_no_gradient(whole):
    """Why a forward keeps the very weights that it computed with."""
    trunk = trunk_of(whole)
    for name in ("one", "two"):
        inject_adapter_in_model(config_of(LORA), trunk.causal_lm, name)
    layers = [module for module in trunk.modules() if isinstance(module, LoraLayer)]
    missing = {}
    for turns in (["one"], ["one", "two"]):
        trunk.zero_grad()
        outputs = []
        for turn in turns:
            for layer in layers:
                layer.set_adapter(turn)
            outputs.append(trunk(X, position_ids=torch.arange(5).expand(2, 5)))
        outputs[0].backward(UP)
        weights = weights_of(trunk.causal_lm, "one").values()
        missing[len(turns)] = all(weight.grad is None for weight in weights)
    assert missing == {1: False, 2: True}


def test_a_run_that_opens_or_closes_between_forward_and_backward_changes_nothing(desk, whole):
    run = desk.open(lora=DROPS, tape=TapeSettings(checkpoint_every=1))
    expected = alone(whole, DROPS, weights_now(run), seed=SEED)
    output = desk.forward(run, seed=SEED)
    other = desk.open("letters", OTHER)
    desk.forward(other)
    desk.table.close("letters")
    assert Given(output, desk.backward(run), gradients_of(run)) == expected
    desk.apply(run, rate=0.0)
    desk.open("letters", OTHER)
    assert asked(desk, run, seed=SEED) == expected, "and it goes on"


def test_generation_in_between_changes_nothing(desk, whole):
    run = desk.open(lora=DROPS, tape=TapeSettings(recompute=True))
    expected = alone(whole, DROPS, weights_now(run), seed=SEED)
    output = desk.forward(run, seed=SEED)
    desk.state.set(BARE)
    with torch.inference_mode():
        desk.trunk(Y, position_ids=torch.arange(5)[None])
    assert Given(output, desk.backward(run), gradients_of(run)) == expected


TAPES = [TapeSettings(), TapeSettings(recompute=True), TapeSettings(checkpoint_every=1)]


@pytest.mark.parametrize("tape", TAPES, ids=str)
def test_a_gradient_belongs_to_the_version_of_its_forward(desk, whole, tape):
    run = desk.open(tape=tape)
    before = weights_now(run)
    asked(desk, run, Y, microbatch=0)
    output = desk.forward(run, X, microbatch=1)
    desk.apply(run, rate=0.5)
    assert gradients_of(run) == {}
    below = desk.backward(run, UP, step=1, microbatch=1)
    given = Given(output, below, gradients_of(run))
    assert given == alone(whole, LORA, before)
    assert given != alone(whole, LORA, weights_now(run)), "or the version would not matter"


@pytest.mark.parametrize("limit", [0, 2])
def test_a_gradient_that_is_older_than_the_limit_is_refused(whole, limit):
    desk = Desk(whole, staleness_limit=limit)
    run = desk.open()
    for microbatch in (1, 2):
        desk.forward(run, Y, microbatch=microbatch)
    desk.train(run, *[X] * limit)
    if limit:
        desk.backward(run, step=1, microbatch=1)
        desk.apply(run)
    else:
        desk.train(run, X)
    with pytest.raises(StaleGradient, match=f"is at {limit + 1}, and {limit} steps") as refused:
        desk.backward(run, step=1, microbatch=2)
    assert refused.value.facts == {"current_version": limit + 1, "staleness": limit + 1}
    assert gradients_of(run) == {}


# ---------------------------------------------------------------- what the tape keeps

KINDS = {
    "recomputed": TapeSettings(recompute=True),
    "every layer": TapeSettings(checkpoint_every=1),
    "every second layer": TapeSettings(checkpoint_every=2),
    "both": TapeSettings(recompute=True, checkpoint_every=1),
}


@pytest.mark.parametrize("lora", [DROPS, replace(DROPS, use_dora=True)], ids=["lora", "dora"])
@pytest.mark.parametrize("autocast", ["", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recomputed_gives_what_was_kept(desk, kind, autocast, lora):
    kept, again = (
        desk.open(name, lora, tape=tape, precision=Precision(autocast=autocast))
        for name, tape in (("notes", TapeSettings()), ("other", KINDS[kind]))
    )
    expected = asked(desk, kept, seed=SEED)
    output = desk.forward(again, seed=SEED)
    torch.rand(3)
    assert Given(output, desk.backward(again), gradients_of(again)) == expected


def test_the_less_is_kept_the_fewer_bytes_it_takes(desk):
    sizes = []
    for number, tape in enumerate((TapeSettings(), TapeSettings(checkpoint_every=1), TapeSettings(True))):
        run = desk.open(f"run-{number}", DROPS, tape=tape)
        before = desk.tape.bytes
        desk.forward(run, seed=SEED)
        sizes.append(desk.tape.bytes - before)
    kept, checkpointed, recomputed = sizes
    assert recomputed == X.nbytes
    assert recomputed < checkpointed < kept


@pytest.mark.parametrize(
    "second",
    [LORA, replace(LORA, use_dora=True), replace(LORA, rank_pattern={"down_proj": 64})],
    ids=["alike", "dora", "a larger rank"],
)
def test_each_run_is_counted_at_what_its_forwards_keep_alive(desk, second):
    """Neither at another run's size, nor with what a forward let go of again (DoRA: all its weights)."""
    for run in (desk.open("notes", LORA), desk.open("other", second)):
        before = desk.tape.bytes
        desk.forward(run)
        counted = desk.tape.bytes - before
        assert counted == pytest.approx(X.nbytes + kept_alive(desk, run), rel=0.05)


def kept_alive(desk: Desk, run: Run) -> int:
    """The bytes of the graph of one more forward, its weights aside."""
    kept = []

    def note(tensor: Tensor) -> Tensor:
        alias = tensor.detach()
        kept.append(weakref.ref(alias))
        return alias

    with saved_tensors_hooks(note, lambda tensor: tensor):
        desk.forward(run, microbatch=1)
    weights = {weight.data_ptr() for weight in desk.trunk.parameters()}
    alive = [tensor for each in kept if (tensor := each()) is not None and tensor.data_ptr() not in weights]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    return sum(storages.values())


@pytest.mark.parametrize("tape", [*TAPES, TapeSettings(True, 2)], ids=str)
def test_a_forward_that_expired_is_forwarded_again_bit_for_bit(desk, tape):
    run, undisturbed = (desk.open(name, DROPS, tape=tape) for name in ("notes", "other"))
    expected = asked(desk, undisturbed, seed=SEED)
    first = desk.forward(run, seed=SEED)
    assert desk.tape.expire(time.monotonic() + LEASE_S / 2) == 0
    assert desk.tape.expire(time.monotonic() + LEASE_S + 1) == 1
    with pytest.raises(TapeExpired, match="forward again"):
        desk.backward(run)
    assert gradients_of(run) == {}
    assert torch.equal(desk.forward(run, seed=SEED), first)
    assert Given(first, desk.backward(run), gradients_of(run)) == expected


def test_a_batch_that_never_fits_is_refused_and_pushes_nothing_out(whole):
    desk = Desk(whole, budget=int(1.5 * needed_bytes(whole)))
    run = desk.open()
    desk.forward(run)
    for _ in range(2):
        with pytest.raises(ResourceExhausted, match="--tape-budget") as refused:
            desk.forward(run, values(5, rows=8), microbatch=1)
        assert refused.value.facts["wanted_bytes"] > refused.value.facts["total_bytes"]
    assert desk.backward(run) is not None


def test_another_forwards_room_is_taken_from_the_oldest_which_is_then_forwarded_again(whole):
    desk = Desk(whole, budget=int(2.5 * needed_bytes(whole)))
    run = desk.open(lora=DROPS)
    outputs = [desk.forward(run, X, seed=SEED + number, microbatch=number) for number in range(3)]
    desk.backward(run, microbatch=2)
    with pytest.raises(TapeExpired):
        desk.backward(run, microbatch=0)
    assert torch.equal(desk.forward(run, X, seed=SEED, microbatch=0), outputs[0])
    desk.backward(run, microbatch=0)
    desk.backward(run, microbatch=1)
    assert (len(desk.tape), desk.tape.bytes) == (0, 3 * X.nbytes)


def needed_bytes(whole: PreTrainedModel) -> int:
    desk = Desk(whole)
    desk.forward(desk.open(lora=DROPS), seed=SEED)
    return desk.tape.bytes


def test_evaluation_keeps_nothing_drops_nothing_and_uses_the_weights_as_they_are(desk, whole):
    run = desk.open(lora=DROPS, tape=TapeSettings(checkpoint_every=1))
    desk.state.set(BARE, training=True)
    output = desk.evaluate(run, seed=SEED)
    assert torch.equal(output, alone(whole, DROPS, weights_now(run)).output)
    assert (len(desk.tape), run.step, gradients_of(run)) == (0, 0, {})
    expected = alone(whole, DROPS, weights_now(run), seed=SEED)
    trained = desk.forward(run, seed=SEED)
    desk.evaluate(run, Y, microbatch=7)
    assert Given(trained, desk.backward(run), gradients_of(run)) == expected
    desk.apply(run)
    assert not torch.equal(desk.evaluate(run, step=99), output), "and it may be asked for at any time"


def test_a_run_that_was_just_opened_drops_nothing_in_evaluation(desk, whole):
    """PEFT's new layers are in training mode, whatever the model around them is in."""
    run = desk.open(lora=DROPS)
    expected = alone(whole, DROPS, weights_now(run))
    assert torch.equal(desk.evaluate(run), expected.output)
    assert asked(desk, run) == expected, "nor in a forward without a seed"


# ---------------------------------------------------------------- asked twice, asked wrong


def test_an_optimizer_step_that_is_asked_twice_is_done_once(desk):
    run = desk.open()
    asked(desk, run)
    first = desk.apply(run, step=1)
    moved = weights_now(run)
    assert desk.apply(run, step=1) is first
    assert (first.stepped, first.versions.version, run.step) == (True, 1, 1)
    assert same(weights_now(run), moved)


@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.GRADIENT_NORMS, Phase.OPTIMIZER_STEP])
@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_a_step_that_is_not_the_next_is_out_of_order_and_says_which_is(desk, phase, step):
    run = desk.open()
    desk.train(run, X, Y)
    if (phase, step) == (Phase.OPTIMIZER_STEP, 2):
        return
    before = weights_now(run)
    with pytest.raises(StepOutOfOrder) as refused:
        desk.ask(run, phase, X, step=step, optimizer=OptimizerStep(1.0, 0.1))
    assert refused.value.facts == {"current_step": 3, "current_version": 2}
    assert same(weights_now(run), before)


def test_a_backward_that_is_asked_twice_counts_once(desk):
    run = desk.open()
    expected = asked(desk, run)
    assert torch.equal(desk.backward(run), expected.below)
    assert same(gradients_of(run), expected.gradients)


@pytest.mark.parametrize("lora", [DROPS, LoraSettings(r=0)], ids=["trained", "not trained"])
def test_a_backward_whose_kept_answer_is_gone_too_is_computed_again_and_counts_once(desk, lora):
    run = desk.open(lora=lora) if lora.r else desk.table.open(ME, OpenRun("bare", RunSettings(lora=lora))).run
    expected = asked(desk, run, seed=SEED)
    desk.tape.forget_answers(run.owner.number)
    with pytest.raises(TapeExpired):
        desk.backward(run)
    assert asked(desk, run, seed=SEED) == expected
    assert run.owner.contribution.has((1, 0))


def test_without_a_gradient_to_answer_a_repeated_backward_needs_nothing_that_was_kept(desk):
    run = desk.open()
    expected = asked(desk, run, want_input_gradient=False)
    assert desk.tape.bytes == 0
    assert desk.backward(run, want_input_gradient=False) is None
    assert same(gradients_of(run), expected.gradients)


def test_however_many_microbatches_a_step_has_what_is_kept_of_them_stays_within_the_budget(whole):
    budget = needed_bytes(whole) + 2 * X.nbytes
    desk = Desk(whole, budget=budget)
    run = desk.open(lora=DROPS)
    for microbatch in range(12):
        desk.forward(run, seed=SEED, microbatch=microbatch)
        desk.backward(run, microbatch=microbatch)
        assert desk.tape.bytes <= budget
    assert desk.tape.bytes > 2 * X.nbytes, "or nothing would have been kept"
    assert desk.tape.evicted == 0, "no forward had to go for it"
    desk.apply(run)
    assert desk.tape.bytes == 0


def test_what_its_client_has_is_no_longer_kept(desk):
    run = desk.open()
    for microbatch in range(3):
        desk.forward(run, microbatch=microbatch)
        desk.backward(run, microbatch=microbatch)
    desk.ask(run, Phase.GRADIENT_NORMS, acked_through=2)
    assert desk.tape.bytes == X.nbytes
    assert desk.backward(run, microbatch=2) is not None
    with pytest.raises(TapeExpired):
        desk.backward(run, microbatch=1)


def test_a_forward_that_is_asked_twice_is_kept_once(desk):
    run = desk.open(lora=DROPS)
    first = desk.forward(run, seed=SEED)
    size = desk.tape.bytes
    assert torch.equal(desk.forward(run, seed=SEED), first)
    assert (len(desk.tape), desk.tape.bytes) == (1, size)


def test_a_gradient_of_another_shape_is_refused_and_the_forward_can_be_asked_for_again(desk, whole):
    run = desk.open()
    desk.forward(run)
    with pytest.raises(MessageError, match="shape"):
        desk.backward(run, values(1, tokens=6))
    assert gradients_of(run) == {}
    assert asked(desk, run) == alone(whole, LORA, weights_now(run))


@pytest.mark.parametrize("lora", [LORA, LoraSettings(r=0)], ids=["trained", "not trained"])
def test_a_gradient_at_the_lower_cut_that_the_forward_did_not_prepare_is_refused(desk, lora):
    run = desk.table.open(ME, OpenRun("notes", RunSettings(lora=lora))).run
    desk.forward(run, want_input_gradient=False)
    with pytest.raises(MessageError):
        desk.backward(run)


def test_a_backward_without_its_forward_is_refused(desk):
    with pytest.raises(TapeExpired):
        desk.backward(desk.open())


def test_an_optimizer_step_says_how_far_and_has_gradients(desk):
    run = desk.open()
    with pytest.raises(MessageError, match="no gradients"):
        desk.apply(run)
    asked(desk, run)
    with pytest.raises(MessageError, match="learning rate"):
        desk.ask(run, Phase.OPTIMIZER_STEP)
    assert (run.step, run.version) == (0, 0)
    assert desk.apply(run).stepped


def test_a_skipped_step_says_so_and_the_next_one_is_of_the_same_version(desk):
    run = desk.open()
    asked(desk, run)
    before = weights_now(run)
    answer = desk.ask(run, Phase.OPTIMIZER_STEP, optimizer=OptimizerStep(skip=True))
    assert (answer.stepped, answer.versions.version) == (False, 0)
    assert (run.step, gradients_of(run)) == (1, {})
    assert same(weights_now(run), before)
    desk.train(run, X)
    assert (run.step, run.version) == (2, 1)


# ---------------------------------------------------------------- another takes over


def test_who_joins_fences_the_older_incarnation_off_and_discards_its_gradients(desk):
    run, other = desk.open(), desk.open("other")
    desk.train(run, X)
    asked(desk, run, X, microbatch=0)
    desk.forward(run, Y, microbatch=1)
    desk.forward(other)
    assert desk.table.join(YOU, "notes").run is run
    assert gradients_of(run) == {}
    assert len(desk.tape) == 1, "the other run's"
    for phase, tensor in ((Phase.FORWARD, X), (Phase.BACKWARD, UP), (Phase.OPTIMIZER_STEP, None)):
        with pytest.raises(RunLost, match="incarnation 2"):
            desk.ask(run, phase, tensor, incarnation=1, microbatch=1)
    with pytest.raises(TapeExpired):
        desk.backward(run, microbatch=1)
    with pytest.raises(TapeExpired):
        desk.backward(run, microbatch=0)
    desk.train(run, X)
    assert (run.step, run.version) == (2, 2)


def test_a_run_whose_optimizer_failed_halfway_does_no_further_step_until_it_is_restored(desk):
    run = desk.open(optimizer=OptimizerSettings("adamw_torch"))
    desk.train(run, X)
    snapshot = run.snapshot()
    run.optimizer.state[list(run.masters.values())[1]]["exp_avg"] = torch.zeros(7)
    with pytest.raises(RunBroken):
        desk.train(run, Y)
    for phase, tensor in ((Phase.FORWARD, X), (Phase.EVALUATE, X), (Phase.OPTIMIZER_STEP, None)):
        with pytest.raises(RunBroken, match="restore its last checkpoint"):
            desk.ask(run, phase, tensor, optimizer=OptimizerStep(1.0, 0.1))
    desk.table.restore(YOU, snapshot)
    desk.train(run, Y)
    assert (run.step, run.version) == (2, 2)


def test_a_run_that_is_gone_is_lost_to_its_client(desk):
    run = desk.open()
    desk.forward(run)
    desk.table.close("notes")
    assert (len(desk.table), desk.tape.bytes) == (0, 0)
    with pytest.raises(RunLost, match="join it again"):
        desk.backward(run)
    with pytest.raises(RunLost, match="open it, or restore"):
        desk.table.join(YOU, "notes")


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_a_restored_run_trains_on_as_if_undisturbed(desk, whole, optimizer, is_open):
    settings = {"lora": DROPS, "optimizer": OptimizerSettings(optimizer, momentum=0.9, weight_decay=0.1)}
    run = desk.open(**settings)
    desk.train(run, X, Y)
    snapshot = run.snapshot()
    desk.train(run, Y, X)
    expected = weights_now(run)
    second = Desk(whole)
    if is_open:
        before = second.open(**settings)
        second.train(before, X)
        second.forward(before)
    restored = second.table.restore(YOU, snapshot).run
    assert (restored.step, restored.version, len(second.tape)) == (2, 2, 0)
    assert same(weights_now(restored), dict(snapshot.weights))
    if is_open:
        assert restored is before
        with pytest.raises(RunLost):
            second.ask(before, Phase.FORWARD, X, incarnation=1)
    second.train(restored, Y, X)
    assert same(weights_now(restored), expected)
    assert (restored.step, restored.version) == (4, 4)
