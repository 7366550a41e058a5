"""A run's weights move as torch would move them, once a step; older versions stay what they are."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from splitlearn.engine.optimizer import BUILDERS
from splitlearn.engine.run import Run
from splitlearn.errors import CheckpointError, MessageError, RunBroken, SettingError, StepOutOfOrder
from splitlearn.vocabulary import SERVER_OPTIMIZERS, OptimizerSettings, Phase, RunSettings, StepKey
from splitlearn.wire.messages import AnswerMessage, OptimizerStep

ME, YOU = b"me", b"you"
SHAPES = {"lower.lora_A": (2, 3), "lower.lora_B": (3, 2), "upper.lora_A": (2, 3)}
SGD = OptimizerSettings("sgd", momentum=0.9)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def first_weights() -> dict[str, Tensor]:
    return {name: numbers(*shape, seed=place) for place, (name, shape) in enumerate(SHAPES.items())}


def a_run(optimizer: OptimizerSettings = SGD, **settings) -> Run:
    return Run("notes", RunSettings(optimizer=optimizer, **settings), "slot0", first_weights(), ME)


def gradients(seed: int) -> list[Tensor]:
    return [numbers(*shape, seed=100 * seed + place) for place, shape in enumerate(SHAPES.values())]


def weights_of(run: Run) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in run.current.weights.items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def train(run: Run, *seeds: int, rate: float = 0.1) -> None:
    for seed in seeds:
        run.owner.contribution.add(gradients(seed), 1.0)
        run.apply(OptimizerStep(1.0, rate))


# ---------------------------------------------------------------- gradients


def test_microbatches_add_up_in_the_order_they_come_as_torch_adds_them():
    run, weight = a_run(), torch.nn.Parameter(torch.zeros(2, 3))
    for seed in (1, 2, 3):
        run.owner.contribution.add(gradients(seed), 1.0)
        (weight * gradients(seed)[0]).sum().backward()
    assert torch.equal(run.gradients()["lower.lora_A"], weight.grad)
    other = a_run()
    for seed in (3, 2, 1):
        other.owner.contribution.add(gradients(seed), 1.0)
    assert not same(other.gradients(), run.gradients()), "or the order would not matter"


def test_each_microbatchs_own_loss_scale_is_taken_out():
    run, plain = a_run(), a_run()
    for seed, scale in ((1, 1024.0), (2, 4.0), (3, 1.0)):
        plain.owner.contribution.add(gradients(seed), 1.0)
        run.owner.contribution.add([gradient * scale for gradient in gradients(seed)], scale)
    assert same(run.gradients(), plain.gradients())


def test_gradients_in_half_precision_are_added_in_float32():
    run = a_run()
    small = [torch.full(shape, 2.0**-12, dtype=torch.bfloat16) for shape in SHAPES.values()]
    run.owner.contribution.add([torch.ones_like(each) for each in small], 1.0)
    run.owner.contribution.add(small, 1.0)
    assert {gradient.dtype for gradient in run.gradients().values()} == {torch.float32}
    assert run.gradients()["lower.lora_B"][0, 0] == 1 + 2.0**-12


def test_norms_are_torchs_one_a_weight_and_minus_one_where_there_is_none():
    run, arrived = a_run(), gradients(1)
    run.owner.contribution.add([arrived[0], None, arrived[2]], 1.0)
    there = torch._foreach_norm([arrived[0], arrived[2]], 2.0)
    assert torch.equal(run.owner.contribution.norms(), torch.stack([there[0], torch.tensor(-1.0), there[1]]))
    assert a_run().owner.contribution.norms().tolist() == [-1, -1, -1]
    assert Run("bare", RunSettings(), None, {}, ME).owner.contribution.norms().shape == (0,)


# ---------------------------------------------------------------- optimizer steps


@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - SERVER_OPTIMIZERS))
def test_steps_move_the_weights_as_the_librarys_optimizer_does(name):
    settings = OptimizerSettings(
        name, weight_decay=0.1, beta1=0.8, beta2=0.95, epsilon=1e-6, momentum=0.7 if name == "sgd" else 0.0
    )
    run, weights = a_run(settings), [torch.nn.Parameter(weight) for weight in first_weights().values()]
    how = {"betas": (0.8, 0.95), "eps": 1e-6, "fused": name.endswith("fused")}
    theirs = (
        torch.optim.SGD(weights, momentum=0.7, weight_decay=0.1)
        if name == "sgd"
        else torch.optim.AdamW(weights, weight_decay=0.1, **how)
    )
    for seed, (scale, rate) in enumerate([(1.0, 0.1), (0.25, 0.05), (1.0, 0.0), (0.5, 0.2)]):
        run.owner.contribution.add(gradients(seed), 1.0)
        run.apply(OptimizerStep(scale, rate))
        for weight, gradient in zip(weights, gradients(seed), strict=True):
            weight.grad = gradient * scale
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
    assert same(weights_of(run), dict(zip(SHAPES, [each.detach() for each in weights], strict=True)))


def test_an_optimizer_that_the_trunk_lacks_is_refused_with_those_it_has():
    with pytest.raises(
        SettingError, match=r"adafactor.*adamw_torch, adamw_torch_fused, fedadam, fedyogi, sgd"
    ):
        a_run(OptimizerSettings("adafactor"))


def test_each_step_publishes_a_version_and_the_older_ones_stay_what_they_are():
    run = a_run()
    held = [run.current]
    copies = [weights_of(run)]
    for seed in (1, 2):
        train(run, seed)
        held.append(run.current)
        copies.append(weights_of(run))
    assert [version.number for version in held] == [0, 1, 2]
    assert all(same(dict(version.weights), then) for version, then in zip(held, copies, strict=True))
    assert not same(copies[1], copies[2])


def test_the_newest_version_takes_no_memory_of_its_own_and_a_restore_leaves_the_others_as_they_are():
    run = a_run()
    start = run.snapshot()
    train(run, 1)
    version, values = run.current, weights_of(run)
    for name, master in run.masters.items():
        assert version.weights[name].data_ptr() == master.data_ptr()
    run.restore(start)
    assert all(torch.equal(version.weights[name], value) for name, value in values.items())
    assert not same(weights_of(run), values)
    train(run, 1)
    assert same(weights_of(run), values)


def test_gradients_are_used_once():
    run = a_run()
    train(run, 1)
    assert list(run.gradients().values()) == [None] * 3
    with pytest.raises(MessageError, match="backward first"):
        run.apply(OptimizerStep(1.0, 0.1))
    assert (run.step, run.version) == (1, 1), "a refused step moves nothing"


def test_a_weight_without_a_gradient_stays_where_it_is():
    run, before = a_run(OptimizerSettings("adamw_torch", weight_decay=0.5)), first_weights()
    run.owner.contribution.add([gradients(1)[0], None, None], 1.0)
    run.apply(OptimizerStep(1.0, 0.1))
    stayed = [name for name, weight in weights_of(run).items() if torch.equal(weight, before[name])]
    assert stayed == ["lower.lora_B", "upper.lora_A"]


@pytest.mark.parametrize("name", BUILDERS)
def test_a_skipped_step_drops_its_gradients_and_moves_the_step_alone(name):
    run, plain = (a_run(OptimizerSettings(name, momentum=0.9)) for _ in range(2))
    train(run, 1)
    before = run.current
    run.owner.contribution.add([gradient * torch.inf for gradient in gradients(2)], 1.0)
    run.apply(OptimizerStep(skip=True))
    assert run.current is before
    assert (run.step, run.version, run.skipped) == (2, 1, 1)
    assert list(run.gradients().values()) == [None] * 3
    train(run, 3)
    train(plain, 1, 3)
    assert same(weights_of(run), weights_of(plain)), "the optimizer has not seen what was skipped"


def test_a_step_may_be_skipped_before_any_gradient_came():
    run = a_run()
    run.apply(OptimizerStep(skip=True))
    assert (run.step, run.version) == (1, 0)


def test_a_run_without_weights_counts_its_steps():
    run = Run("bare", RunSettings(), None, {}, ME)
    run.owner.contribution.add([], 1.0)
    run.apply(OptimizerStep(1.0, 0.1))
    assert (run.step, run.version) == (1, 0)


def break_optimizer(run: Run) -> None:
    """Its state of one weight is of another shape: torch steps those before it, then fails."""
    run.optimizer.state[run.masters["lower.lora_B"]]["exp_avg"] = torch.zeros(7)


def test_an_optimizer_that_fails_halfway_breaks_the_run_until_a_snapshot_is_restored():
    run, undisturbed = (a_run(OptimizerSettings("adamw_torch")) for _ in range(2))
    train(run, 1)
    snapshot, published = run.snapshot(), weights_of(run)
    break_optimizer(run)
    with pytest.raises(RunBroken, match=r"step 2 of run notes.*resume_from_checkpoint"):
        train(run, 2)
    moved = [not torch.equal(run.masters[name], published[name]) for name in SHAPES]
    assert moved == [True, False, False], "or it would not be half stepped"
    assert (run.step, run.version, run.facts().state) == (1, 1, "broken")
    assert same(weights_of(run), published), "what was published stays what it was"
    for do in (run.snapshot, run.download, run.require_whole):
        with pytest.raises(RunBroken):
            do()
    run.rejoin(YOU)
    with pytest.raises(RunBroken):
        run.require_whole()
    run.restore(snapshot)
    run.require_whole()
    train(run, 2, 3)
    train(undisturbed, 1, 2, 3)
    assert same(weights_of(run), weights_of(undisturbed))


def test_a_restore_that_fails_halfway_leaves_a_run_that_says_so(monkeypatch):
    run = a_run(OptimizerSettings("adamw_torch"))
    train(run, 1)
    snapshot, then = run.snapshot(), weights_of(run)
    train(run, 2)
    published = weights_of(run)
    with monkeypatch.context() as full:
        full.setattr(run, "_published", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            run.restore(snapshot)
    assert same({name: master.detach() for name, master in run.masters.items()}, then)
    assert same(weights_of(run), published), "or it would not be a mixture"
    assert run.facts().state == "broken"
    for do in (run.snapshot, run.download, run.require_whole):
        with pytest.raises(RunBroken, match=r"restoring step 1 of run notes failed halfway.*again"):
            do()
    run.restore(snapshot)
    assert run.facts().state == "open"
    assert same(weights_of(run), then)


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


# ---------------------------------------------------------------- order


def answer(step: int, microbatch: int = 0, phase: Phase = Phase.BACKWARD) -> AnswerMessage:
    return AnswerMessage(StepKey(run=5, step=step, microbatch=microbatch, phase=phase))


def test_a_step_that_was_done_is_answered_from_what_was_kept_and_any_other_is_out_of_order():
    run = a_run()
    assert run.owner.kept_step(1) is None, "the next one is to be done"
    train(run, 1)
    done = answer(1, phase=Phase.OPTIMIZER_STEP)
    run.owner.last = done
    assert run.owner.kept_step(1) is done
    assert run.owner.kept_step(2) is None
    for wrong in (0, 3, 99):
        with pytest.raises(StepOutOfOrder, match="next is step 2") as refused:
            run.owner.kept_step(wrong)
        assert refused.value.facts == {"current_step": 2, "current_version": 1}


def test_a_microbatch_that_is_computed_again_counts_once_a_step():
    run, plain = a_run(), a_run()
    plain.owner.contribution.add(gradients(1), 1.0)
    for _ in range(2):
        run.owner.contribution.add_once((1, 0), gradients(1), 1.0)
    assert same(run.gradients(), plain.gradients())
    assert run.owner.contribution.has((1, 0))
    assert not run.owner.contribution.has((1, 1))
    run.apply(OptimizerStep(1.0, 0.1))
    assert not run.owner.contribution.has((1, 0))


def test_who_joins_gets_a_new_incarnation_and_nothing_half_done():
    run = a_run()
    train(run, 1)
    before = run.current
    run.owner.last = answer(1, phase=Phase.OPTIMIZER_STEP)
    run.owner.contribution.add_once((2, 0), gradients(2), 1.0)
    run.rejoin(YOU)
    facts = run.facts()
    assert (run.client, facts.incarnation, facts.step, facts.version) == (YOU, 2, 1, 1)
    assert run.current is before
    assert list(run.gradients().values()) == [None] * 3
    assert not run.owner.contribution.has((2, 0))
    with pytest.raises(StepOutOfOrder):
        run.owner.kept_step(1)


# ---------------------------------------------------------------- snapshots


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_restored_run_goes_on_as_if_nothing_had_happened(name, momentum):
    decay = 0.0 if name in SERVER_OPTIMIZERS else 0.01
    settings = OptimizerSettings(name, momentum=momentum, weight_decay=decay)
    run, restored = a_run(settings), a_run(settings)
    train(run, 1, 2)
    run.apply(OptimizerStep(skip=True))
    snapshot = run.snapshot()
    train(run, 3, 4)
    train(restored, 9)
    restored.owner.contribution.add(gradients(8), 1.0)
    restored.restore(snapshot)
    assert (restored.step, restored.version, restored.skipped) == (3, 2, 1)
    assert list(restored.gradients().values()) == [None] * 3
    assert same(dict(snapshot.weights), weights_of(restored))
    train(restored, 3, 4)
    assert same(weights_of(restored), weights_of(run))
    assert (restored.step, restored.version) == (run.step, run.version)
    assert same(dict(restored.snapshot().optimizer), dict(run.snapshot().optimizer))


def test_the_optimizers_state_is_part_of_a_snapshot():
    """Or the test above would hold for weights alone."""
    run, restored = (a_run(OptimizerSettings("adamw_torch")) for _ in range(2))
    train(run, 1, 2)
    restored.restore(replace(run.snapshot(), optimizer={}))
    train(run, 3)
    train(restored, 3)
    assert not same(weights_of(restored), weights_of(run))


def test_a_snapshot_is_a_copy_and_may_be_restored_more_than_once():
    run = a_run(OptimizerSettings("adamw_torch"))
    train(run, 1)
    snapshot = run.snapshot()
    weights, state = (
        {name: each.clone() for name, each in part.items()} for part in (snapshot.weights, snapshot.optimizer)
    )
    ends = []
    for _ in range(2):
        train(run, 2, 3)
        ends.append(weights_of(run))
        assert same(dict(snapshot.weights), weights)
        assert same(dict(snapshot.optimizer), state)
        run.restore(snapshot)
    assert same(*ends)


def test_a_snapshot_before_the_first_step_has_no_optimizer_state_and_is_restored():
    run = a_run(OptimizerSettings("adamw_torch"))
    snapshot = run.snapshot()
    train(run, 1)
    once = weights_of(run)
    run.restore(snapshot)
    assert same(weights_of(run), first_weights())
    train(run, 1)
    assert same(weights_of(run), once)


@pytest.mark.parametrize("what", ["a weight less", "another shape", "other names"])
def test_a_snapshot_of_another_adapter_is_refused_and_changes_nothing(what):
    run = a_run()
    train(run, 1)
    snapshot, before = run.snapshot(), run.current
    weights = dict(snapshot.weights)
    first = weights.pop("lower.lora_A")
    if what == "another shape":
        weights = {"lower.lora_A": first[:1], **weights}
    elif what == "other names":
        weights = {"lower.lora_C": first, **weights}
    with pytest.raises(CheckpointError, match="another adapter"):
        run.restore(replace(snapshot, weights=weights, step=9))
    assert run.current is before
    assert run.step == 1
    assert same({name: master.detach() for name, master in run.masters.items()}, weights_of(run))
