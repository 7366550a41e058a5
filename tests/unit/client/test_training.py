"""A loop of one's own trains a split model to the whole model's weights, and never silently a part of it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, Trainer, TrainingArguments

from splitlearn.client.training import clip_grad_norm, plan_run, prepare_training
from splitlearn.config import RunConfig
from splitlearn.engine.engine import Engine
from splitlearn.engine.run import Run
from splitlearn.errors import SettingError, StepOutOfOrder, UnappliedGradients, UnsupportedCall
from splitlearn.model.lora import ADAPTER, add_lora, draw, settings_of, weights_of
from splitlearn.testing import lively_model, split_over_loopback, tiny_whole
from splitlearn.vocabulary import OptimizerSettings, Phase
from splitlearn.wire.messages import RunStepMessage

WAIT_S = 20
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
RATES = (0.05, 0.02, 0.01)
ADAMW = OptimizerSettings("adamw_torch_fused", learning_rate=RATES[0], weight_decay=0.01)
PARTS = {"bottom": range(2), "trunk": range(2, 4), "top": range(4, 6)}


def a_batch(seed: int) -> dict[str, Tensor]:
    """Two rows, the second of them shorter."""
    ids = torch.randint(4, 128, (2, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model("llama", tmp_path_factory.mktemp("model"))


def whole_of(folder: Path, lora: LoraConfig | None = LORA, freeze: Sequence[str] = ()) -> PreTrainedModel:
    whole = tiny_whole(folder)
    if lora is not None:
        add_lora(whole, settings_of(lora, "llama"), ADAPTER, seed=0)
    for part in freeze:
        for index in PARTS[part]:
            whole.model.layers[index].requires_grad_(False)
        for module in {"bottom": [whole.model.embed_tokens], "top": [whole.model.norm, whole.lm_head]}.get(
            part, []
        ):
            module.requires_grad_(False)
    return whole.train()


@contextmanager
def split_of(
    folder: Path, lora: LoraConfig | None = LORA, freeze: Sequence[str] = (), runs: RunConfig | None = None
) -> Iterator[PreTrainedModel]:
    with split_over_loopback(folder, runs=runs) as split:
        prepare_training(split, lora, None, freeze, seed=0)
        plan_run(split.trunk, ADAMW)
        yield split.train()


def engine_of(split: PreTrainedModel) -> Engine:
    return split.trunk.transport._engine


def weights_of_whole(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in weights_of(model, ADAPTER).items()}


def weights_of_split(split: PreTrainedModel) -> dict[str, Tensor]:
    theirs = engine_of(split).runs.do(split.trunk.run.name, Run.snapshot).result(WAIT_S).weights
    return weights_of_whole(split) | dict(theirs)


def gradients_of_trunk(split: PreTrainedModel) -> dict[str, Tensor | None]:
    return engine_of(split).runs.do(split.trunk.run.name, Run.gradients).result(WAIT_S)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def optimizer_of(model: PreTrainedModel) -> torch.optim.Optimizer:
    weights = [each for each in model.parameters() if each.requires_grad]
    # A group, because there are no weights here where bottom and top are frozen.
    return torch.optim.AdamW([{"params": weights}], lr=RATES[0], weight_decay=0.01, fused=True)


def loss_of(model: PreTrainedModel, seed: int) -> Tensor:
    return model(**a_batch(seed)).loss


def train(
    model: PreTrainedModel, max_norm: float = 1.0, accumulation: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """A loop as its user writes it; the losses, and the norms that were clipped by."""
    optimizer, seen = optimizer_of(model), []
    is_split = hasattr(model, "trunk")
    if is_split:
        model.trunk.run.accumulation = accumulation
    for step, rate in enumerate(RATES):
        losses = [loss_of(model, 10 * step + each) for each in range(accumulation)]
        for loss in losses:
            (loss / accumulation).backward()
        optimizer.param_groups[0]["lr"] = rate
        if is_split:
            norm = clip_grad_norm(model, max_norm)
            model.trunk.step(learning_rate=rate)
        else:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((torch.stack(losses).detach(), norm))
    return seen


# ---------------------------------------------------------------- a loop of one's own


@pytest.mark.parametrize(("max_norm", "accumulation"), [(0.1, 1), (0.1, 2), (math.inf, 1)])
def test_a_loop_of_ones_own_ends_with_the_whole_models_weights_bit_for_bit(folder, max_norm, accumulation):
    whole = whole_of(folder)
    first = {name: weight.clone() for name, weight in weights_of_whole(whole).items()}
    expected = train(whole, max_norm, accumulation)
    with split_of(folder) as split:
        for ours, theirs in zip(train(split, max_norm, accumulation), expected, strict=True):
            assert all(map(torch.equal, ours, theirs)), "losses and norms"
        assert same(weights_of_split(split), weights_of_whole(whole))
        assert (split.trunk.run.step, split.trunk.run.version, split.trunk.run.unapplied) == (3, 3, 0)
    assert not any(torch.equal(first[name], weight) for name, weight in weights_of_whole(whole).items())
    assert all(float(norm) > 0.1 for _, norm in expected), "or nothing was clipped"


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_in_half_precision_the_adapter_is_trained_in_float32_as_peft_trains_it(folder, tmp_path, dora):
    """PEFT keeps an adapter in float32 beside a half-precision model: small steps would be rounded away."""
    tiny_whole(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    lora = LoraConfig(r=4, target_modules="all-linear", use_dora=dora)
    whole = get_peft_model(tiny_whole(tmp_path, dtype=torch.bfloat16), lora).train()
    with split_over_loopback(tmp_path, dtype="bfloat16") as split:
        prepare_training(split, lora, None, (), seed=0)
        plan_run(split.trunk, ADAMW)
        draw(unprefixed(weights_of(whole, ADAPTER)), seed=0)
        expected = train(whole)
        for ours, theirs in zip(train(split.train()), expected, strict=True):
            assert all(map(torch.equal, ours, theirs))
        assert same(weights_of_split(split), unprefixed(weights_of_whole(whole)))


def unprefixed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}


def test_a_norm_taken_from_the_three_parts_norms_would_not_be_torchs():
    """Why the trunk sends a norm for each weight."""
    differs = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        parts = [[torch.randn(4, 33, generator=generator) for _ in range(7)] for _ in range(3)]
        whole = torch.nn.utils.get_total_norm([each for part in parts for each in part])
        ours = torch.linalg.vector_norm(
            torch.stack([norm for part in parts for norm in torch._foreach_norm(part, 2.0)])
        )
        assert torch.equal(ours, whole)
        squares = torch.stack([torch.nn.utils.get_total_norm(part) ** 2 for part in parts])
        differs += not torch.equal(squares.sum().sqrt(), whole)
    assert differs > 0


def test_a_norm_that_is_not_finite_is_said(folder):
    with split_of(folder) as split:
        (loss_of(split, 1) * math.inf).backward()
        assert not clip_grad_norm(split, 1.0).isfinite()
        split.trunk.skip_step()
        assert (split.trunk.run.step, split.trunk.run.version) == (1, 0)


def test_clipping_scales_the_trunk_at_its_next_step_and_only_there(folder):
    with split_of(folder) as split:
        loss_of(split, 1).backward()
        clip_grad_norm(split, 0.1)
        assert 0 < split.trunk.gradient_scale < 1
        split.trunk.step()
        assert split.trunk.gradient_scale == 1.0


def test_text_with_the_runs_adapter_is_the_whole_adapted_models(folder):
    whole, bare = whole_of(folder), tiny_whole(folder)
    train(whole)
    prompt = a_batch(99)["input_ids"]
    asked = {
        "do_sample": False,
        "pad_token_id": 0,
        "max_new_tokens": 5,
        "attention_mask": torch.ones_like(prompt),
    }
    with split_of(folder) as split:
        train(split)
        for model in (whole.eval(), bare, split.eval()):
            model.generation_config.eos_token_id = None
        for how in ({}, {"num_beams": 3}, {"use_cache": False}):
            expected = whole.generate(prompt, **asked, **how)
            assert torch.equal(split.generate(prompt, **asked, **how), expected)
            assert not torch.equal(bare.generate(prompt, **asked, **how), expected)
        loss_of(split.train(), 1).backward()
        split.trunk.step()
        assert split.trunk.run.version == 4, "and it trains on"


def test_evaluation_gives_the_whole_models_loss_and_keeps_nothing(folder):
    whole = whole_of(folder)
    train(whole)
    with split_of(folder) as split:
        train(split)
        with torch.no_grad():
            for model in (whole.eval(), split.eval()):
                assert model(**a_batch(5), use_cache=False).loss.isfinite()
            ours, theirs = (model(**a_batch(5), use_cache=False).loss for model in (split, whole))
        assert torch.equal(ours, theirs)
        assert len(engine_of(split).tape) == split.trunk.run.unapplied == 0


def test_layers_recomputed_on_the_clients_side_cost_no_further_message(folder):
    expected = []
    for recomputes in (False, True):
        with split_of(folder) as split:
            if recomputes:
                split.gradient_checkpointing_enable({"use_reentrant": False})
                split.enable_input_require_grads()
            train(split)
            expected.append((weights_of_split(split), split.trunk.transport.traffic.messages))
    assert same(expected[0][0], expected[1][0])
    assert expected[0][1] == expected[1][1]


# ---------------------------------------------------------------- parts that are not trained


@pytest.mark.parametrize(
    "freeze", [["bottom"], ["trunk"], ["top"], ["bottom", "top"], ["bottom", "trunk"]], ids=str
)
def test_what_is_not_frozen_is_trained_as_in_the_whole_model_with_the_same_frozen(folder, freeze):
    whole = whole_of(folder, freeze=freeze)
    first = {name: weight.clone() for name, weight in weights_of_whole(whole).items()}
    expected = train(whole)
    with split_of(folder, freeze=freeze) as split:
        for ours, theirs in zip(train(split), expected, strict=True):
            assert all(map(torch.equal, ours, theirs))
        after = weights_of_split(split)
    assert same(after, {name: each for name, each in weights_of_whole(whole).items() if name in after})
    moved = {name for name, weight in after.items() if not torch.equal(weight, first[name])}
    assert moved == {name for name in first if not any(is_in(part, name) for part in freeze)}
    assert ("trunk" in freeze) == (after.keys() != first.keys()), (
        "the server holds no weight of a frozen trunk"
    )


def is_in(part: str, name: str) -> bool:
    return any(f"layers.{index}." in name for index in PARTS[part])


def test_bottom_and_top_can_be_trained_without_lora(folder):
    whole = whole_of(folder, lora=None, freeze=["trunk"])
    expected = train(whole)
    with split_of(folder, lora=None, freeze=["trunk"]) as split:
        for ours, theirs in zip(train(split), expected, strict=True):
            assert all(map(torch.equal, ours, theirs))
        theirs = dict(whole.named_parameters())
        for name, weight in split.named_parameters():
            assert torch.equal(weight, theirs[name])
        engine = engine_of(split)
        assert engine.runs.do(split.trunk.run.name, lambda run: len(run.masters)).result(WAIT_S) == 0
        assert not [name for name, _ in engine.trunk.named_parameters() if "lora_" in name]


def asked_of(split: PreTrainedModel) -> list[RunStepMessage]:
    """What is sent from now on."""
    sent, original = [], split.trunk.transport.run_step
    split.trunk.transport.run_step = lambda message: sent.append(message) or original(message)
    return sent


@pytest.mark.parametrize(
    ("freeze", "is_wanted"), [([], True), (["bottom"], False), (["top"], True), (["trunk"], True)], ids=str
)
def test_a_gradient_comes_back_only_where_something_below_needs_it(folder, freeze, is_wanted):
    with split_of(folder, freeze=freeze) as split:
        sent = asked_of(split)
        loss_of(split, 1).backward()
        assert [message.key.phase for message in sent] == [Phase.FORWARD, Phase.BACKWARD]
        assert [message.want_input_gradient for message in sent] == [is_wanted] * 2


def test_a_frozen_trunk_needs_no_step_of_its_own(folder):
    """It holds no gradient that anybody could forget to use."""
    with split_of(folder, freeze=["trunk"]) as split:
        optimizer = optimizer_of(split)
        for seed in range(3):
            loss_of(split, seed).backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("lora", "run", "freeze", "named"),
    [
        (LORA, None, ["middle"], "bottom, trunk, top"),
        (LORA, None, ["bottom", "trunk", "top"], "train"),
        (None, None, ["bottom", "trunk", "top"], "train"),
        (None, None, ["bottom"], "LoraConfig"),
        (None, "notes", [], "LoraConfig"),
    ],
    ids=["no part", "all parts", "all parts without lora", "a part without lora", "a run without lora"],
)
def test_what_trains_nothing_is_refused(folder, lora, run, freeze, named):
    with split_over_loopback(folder) as split, pytest.raises(SettingError, match=named):
        prepare_training(split, lora, run, freeze, seed=0)


# ---------------------------------------------------------------- never silently in part


def test_a_loop_that_never_steps_the_trunk_is_told_so(folder):
    with split_of(folder) as split:
        optimizer = optimizer_of(split)
        loss_of(split, 1).backward()
        optimizer.step()
        with pytest.raises(UnappliedGradients, match=r"1 microbatches.*model\.trunk\.step\(\)"):
            loss_of(split, 2)
        split.trunk.step()
        loss_of(split, 2).backward()


def test_a_loop_that_accumulates_may_go_on_as_far_as_it_said(folder):
    with split_of(folder) as split:
        split.trunk.run.accumulation = 2
        for seed in (1, 2):
            loss_of(split, seed).backward()
        with pytest.raises(UnappliedGradients, match="2 microbatches"):
            loss_of(split, 3)
        split.trunk.skip_step()
        loss_of(split, 3).backward()
        assert split.trunk.run.unapplied == 1


def test_the_librarys_trainer_without_the_mixin_is_told_so(folder, tmp_path):
    rows = [{name: tensor[0] for name, tensor in a_batch(seed).items()} for seed in range(4)]
    how = {"max_steps": 3, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), **how)
    with split_of(folder) as split:
        trainer = Trainer(model=split, args=arguments, train_dataset=rows)
        with pytest.raises(UnappliedGradients, match="SplitTrainer"):
            trainer.train()


def test_a_model_that_was_loaded_to_generate_gives_no_gradients_and_says_how_to_get_them(folder):
    with split_over_loopback(folder) as split:
        loss = loss_of(split.train(), 1)
        with pytest.raises(UnsupportedCall, match=r"load it with lora=LoraConfig.*freeze=\['trunk'\]"):
            loss.backward()
        for call in (split.trunk.step, split.trunk.grad_norms, split.trunk.skip_step):
            with pytest.raises(UnsupportedCall, match="lora=LoraConfig"):
                call()
        with pytest.raises(UnsupportedCall, match="lora=LoraConfig"):
            plan_run(split.trunk, ADAMW)


def test_a_call_with_a_cache_gives_no_gradients_and_says_so(folder):
    with split_of(folder) as split:
        ids = a_batch(1)["input_ids"]
        logits = split.eval()(ids, past_key_values=DynamicCache(config=split.config)).logits
        with pytest.raises(UnsupportedCall, match="use_cache=False"):
            logits.sum().backward()
        split(ids, use_cache=False).logits.sum().backward()
        assert any(each is not None for each in gradients_of_trunk(split).values())


def test_an_optimizer_step_that_went_astray_is_out_of_order(folder):
    with split_of(folder) as split:
        loss_of(split, 1).backward()
        split.trunk.run.step = 4
        with pytest.raises(StepOutOfOrder) as refused:
            split.trunk.step()
        assert refused.value.facts["current_step"] == 1


def test_the_trunk_is_told_which_answers_need_no_longer_be_kept(folder):
    with split_of(folder) as split:
        sent = asked_of(split)
        split.trunk.run.accumulation = 4
        losses = [loss_of(split, seed) for seed in (1, 2)]
        for loss in losses:
            loss.backward()
        loss_of(split, 3).backward()
        assert engine_of(split).tape.bytes == sent[-1].tensor_BTD.nbytes, "the last one's alone"
        split.trunk.grad_norms()
        assert engine_of(split).tape.bytes == 0
    told = [each.acked_through for each in sent if each.key.phase is not Phase.BACKWARD]
    assert told == [1, 2, 3, 3]


def test_what_is_on_its_way_back_is_not_acknowledged(folder):
    """Another forward comes meanwhile, as from a second thread."""
    with split_of(folder) as split:
        sent, answered = asked_of(split), split.trunk.transport.run_step
        split.trunk.run.accumulation = 3
        losses = [loss_of(split, 1), loss_of(split, 2)]
        losses.pop().backward()

        def meanwhile(message):
            if message.key.phase is Phase.BACKWARD:
                split.trunk.transport.run_step = answered
                with torch.enable_grad():
                    loss_of(split, 3)
            return answered(message)

        split.trunk.transport.run_step = meanwhile
        losses.pop().backward()
    forwards = [each.acked_through for each in sent if each.key.phase is Phase.FORWARD]
    assert forwards == [1, 2, 0]


# ---------------------------------------------------------------- dropout, forwards that are gone

DROPS = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)


def test_each_microbatch_drops_otherwise_and_a_model_that_evaluates_drops_nothing(folder):
    with split_of(folder, DROPS) as split:
        sent = asked_of(split)
        split.trunk.run.accumulation = 2
        for seed in (1, 2):
            loss_of(split, seed).backward()
        split.trunk.step()
        loss_of(split, 3).backward()
        with torch.no_grad():
            loss_of(split.eval(), 4)
            split(**a_batch(4), use_cache=False)
        split(**a_batch(4), use_cache=False)
    seeds = [message.seed for message in sent if message.key.phase in (Phase.FORWARD, Phase.EVALUATE)]
    assert len(set(seeds[:3])) == 3
    assert all(seeds[:3])
    assert seeds[3:] == [0, 0, 0]


def test_a_forward_that_the_trunk_let_go_of_is_forwarded_again_by_itself(folder):
    """With dropout: the second forward drops what the first did."""
    ends = []
    for disturbed in (False, True):
        with split_of(folder, DROPS) as split:
            torch.manual_seed(3)
            for seed in (1, 2):
                loss = loss_of(split, seed)
                if disturbed:
                    engine = engine_of(split)
                    assert engine._queue.ask(lambda e=engine: e.tape.expire(math.inf)).result(WAIT_S) == 1
                loss.backward()
                split.trunk.step()
            assert split.trunk.run.forwarded_again == 2 * disturbed
            ours = {f"gradient of {name}": each.grad for name, each in weights_of(split, ADAPTER).items()}
            ends.append(weights_of_split(split) | ours)
    assert same(*ends)


def test_the_run_is_planned_until_its_first_step_and_then_stays_what_it_is(folder):
    with split_of(folder) as split:
        assert not split.trunk.is_training
        plan_run(split.trunk, OptimizerSettings("sgd", learning_rate=0.5), accumulation=2)
        loss_of(split, 1)
        assert split.trunk.is_training
        assert split.trunk.run.settings.optimizer.name == "sgd"
        plan_run(split.trunk, OptimizerSettings("sgd", learning_rate=0.1), accumulation=4)
        assert split.trunk.run.accumulation == 4
        plan_run(split.trunk, ADAMW)
        assert not split.trunk.is_training, "nobody has trained it yet: it opens anew"
        loss_of(split, 1).backward()
        split.trunk.step()
        with pytest.raises(SettingError, match="sgd"):
            plan_run(split.trunk, OptimizerSettings("sgd", learning_rate=0.1))
