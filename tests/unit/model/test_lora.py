"""An adapter is PEFT's own, begins the same wherever the model is cut, and leaves the base as it was."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitlearn.errors import AdapterError
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.lora import (
    HARMLESS,
    MAX_RANK,
    TYPED,
    LoraSlots,
    add_lora,
    check,
    config_of,
    draw,
    settings_of,
    weights_of,
)
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.model.weights import load_client, load_trunk
from splitlearn.testing.tiny import tiny_whole
from splitlearn.vocabulary import LoraSettings

PREFIX = "base_model.model."
Q_AND_DOWN = LoraSettings(r=4, target_modules=("q_proj", "down_proj"))
ALL = LoraSettings(r=4, alpha=16.0, target_modules=("all-linear",))
CUT = SplitPlan(6, 2, 2)
HIDDEN_BTD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(5))

# ---------------------------------------------------------------- settings

PLAIN = {
    "names": LoraConfig(
        r=4,
        target_modules=["q_proj", "mlp.up_proj"],
        exclude_modules=["layers.3.mlp.up_proj"],
    ),
    "every linear": LoraConfig(target_modules="all-linear", lora_dropout=0.1),
    "weighed otherwise": LoraConfig(target_modules=["q_proj"], use_rslora=True, use_dora=True, lora_alpha=3),
    "patterns": LoraConfig(
        target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 2}, alpha_pattern={"layers.2.k_proj": 5}
    ),
}


@pytest.mark.parametrize("what", PLAIN)
def test_settings_are_the_same_after_a_way_through_pefts_configuration(what: str) -> None:
    settings = settings_of(PLAIN[what], "llama")
    assert settings_of(config_of(settings), "llama") == settings
    for name in TYPED - {"target_modules", "exclude_modules"}:
        assert getattr(config_of(settings), name) == getattr(PLAIN[what], name)
    assert set(config_of(settings).target_modules) == set(PLAIN[what].target_modules)


def test_targets_that_are_left_out_are_pefts_for_this_family() -> None:
    assert settings_of(LoraConfig(), "llama").target_modules == ("q_proj", "v_proj")
    with pytest.raises(AdapterError, match="all-linear"):
        settings_of(LoraConfig(), "no_such_family")


REFUSED = {
    "init_lora_weights": "pissa",
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "layers_to_transform": [2],
    "layer_replication": [(0, 2)],
    "target_parameters": ["mlp.experts.down_proj"],
    "lora_bias": True,
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_is_more_than_lora_on_layers_is_refused_by_its_name(option: str) -> None:
    config = LoraConfig(target_modules=["q_proj"], **{option: REFUSED[option]})
    with pytest.raises(AdapterError, match=option):
        settings_of(config, "llama")


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "loftq", "gaussian", "orthogonal", False]
)
def test_first_weights_of_another_kind_are_refused(start: str | bool) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    config.init_lora_weights = start
    with pytest.raises(AdapterError, match="init_lora_weights"):
        settings_of(config, "llama")


@pytest.mark.parametrize("option", sorted({each.name for each in fields(LoraConfig)} - TYPED - HARMLESS))
def test_whatever_else_peft_may_know_is_refused(option: str) -> None:
    """Those of later versions, too: the list is of what is allowed."""
    config = LoraConfig(target_modules=["q_proj"])
    setattr(config, option, {"something": "else"})
    with pytest.raises(AdapterError, match=option):
        settings_of(config, "llama")


def test_a_relative_of_lora_is_not_taken_for_it() -> None:
    with pytest.raises(AdapterError):
        settings_of(AdaLoraConfig(target_modules=["q_proj"], total_step=10), "llama")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_one_string_is_a_regular_expression_to_peft_and_refused(field: str) -> None:
    config = LoraConfig(**({"target_modules": ["q_proj"]} | {field: "q_proj"}))
    with pytest.raises(AdapterError, match=f"{field}.*regular expression"):
        settings_of(config, "llama")


EXPRESSIONS = [
    "q_proj|k_proj",
    ".*",
    "^layers.2",
    "q_proj$",
    "(a+)+b",
    r"\w",
    "[qk]_proj",
    "q proj",
    "",
    "q" * 201,
]


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_name_that_is_an_expression_is_refused(field: str, name: str) -> None:
    names = {name: 4} if field.endswith("pattern") else (name,)
    with pytest.raises(AdapterError, match="module's name"):
        check(replace(Q_AND_DOWN, **{field: names}))


WRONG = {
    "no rank": ({"r": 0}, "rank"),
    "a negative rank": ({"r": -1}, "rank"),
    "a rank beyond all layers": ({"r": MAX_RANK + 1}, "rank"),
    "no rank for one layer": ({"rank_pattern": {"q_proj": 0}}, "rank"),
    "a huge rank for one layer": ({"rank_pattern": {"q_proj": MAX_RANK + 1}}, "rank"),
    "nothing but dropout": ({"dropout": 1.0}, "dropout"),
    "negative dropout": ({"dropout": -0.1}, "dropout"),
    "dropout that is no number": ({"dropout": math.nan}, "dropout"),
    "an endless alpha": ({"alpha": math.inf}, "alpha"),
    "an alpha that is no number": ({"alpha_pattern": {"q_proj": math.nan}}, "alpha"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_value_that_no_adapter_has_is_refused(what: str) -> None:
    check(replace(Q_AND_DOWN, r=MAX_RANK))
    wrong, named = WRONG[what]
    with pytest.raises(AdapterError, match=named):
        check(replace(Q_AND_DOWN, **wrong))


# ---------------------------------------------------------------- weights


@pytest.fixture
def folder(folder_of: Callable[..., Path]) -> Path:
    return folder_of("llama")


@pytest.fixture
def trunk(folder: Path) -> TrunkSegment:
    return a_trunk(folder)


whole_of = cache(tiny_whole)


def a_trunk(folder: Path, plan: SplitPlan = CUT) -> TrunkSegment:
    """Modules of its own around the one model's weights, which nobody may change."""
    return TrunkSegment.of_whole(whole_of(folder), plan).eval()


def added(
    model: PreTrainedModel, settings: LoraSettings, seed: int = 0, adapter: str = "default"
) -> dict[str, Tensor]:
    add_lora(model, settings, adapter, seed)
    return {name: weight.detach() for name, weight in weights_of(model, adapter).items()}


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("family", "cut"), [("llama", (2, 2)), ("llama", (1, 4)), ("llama", (3, 1)), ("gpt2", (2, 2))]
)
def test_first_weights_do_not_depend_on_where_the_model_is_cut(
    folder_of: Callable[..., Path], in_process: type, family: str, cut: tuple[int, int]
) -> None:
    folder, plan = folder_of(family), SplitPlan(6, *cut)
    settings = replace(ALL, use_dora=True)
    torch.manual_seed(1)
    whole = added(tiny_whole(folder), settings, seed=7)
    torch.manual_seed(2)
    theirs = added(a_trunk(folder, plan).causal_lm, settings, seed=7)
    client = load_client(Checkpoint.open(folder), plan, lambda: in_process(None))
    ours = added(client, settings, seed=7)
    assert not theirs.keys() & ours.keys()
    assert same(theirs | ours, whole)


def test_first_weights_follow_the_seed_and_the_name(folder: Path) -> None:
    first, again, other = (added(tiny_whole(folder), Q_AND_DOWN, seed=seed) for seed in (3, 3, 4))
    assert same(first, again)
    drawn = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    q_proj = [first[name] for name in drawn if "q_proj" in name]
    assert not any(torch.equal(q_proj[0], each) for each in q_proj[1:])


def test_an_adapter_begins_as_peft_begins_it_and_does_nothing(folder: Path) -> None:
    whole, adapted = tiny_whole(folder), tiny_whole(folder)
    weights = added(adapted, ALL)
    for name, weight in weights.items():
        if "lora_B" in name:
            assert not weight.any()
        else:
            bound = 1 / math.sqrt(weight.shape[1])
            assert 0.8 * bound < weight.abs().max() <= bound
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, whole(ids).logits)


NAMED = {
    "plain": Q_AND_DOWN,
    "every linear": ALL,
    "dora": replace(Q_AND_DOWN, use_dora=True),
    "embedding": replace(Q_AND_DOWN, target_modules=("embed_tokens", "q_proj")),
    "ranks of their own": replace(Q_AND_DOWN, rank_pattern={"layers.2.self_attn.q_proj": 2}),
}


@pytest.mark.parametrize("adapter", ["default", "slot1"])
@pytest.mark.parametrize("what", NAMED)
def test_weights_have_the_names_that_peft_saves_them_under(folder: Path, what: str, adapter: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(tiny_whole(folder), config_of(NAMED[what]), adapter_name=adapter)
        saved = get_peft_model_state_dict(peft, adapter_name=adapter, save_embedding_layers=False)
    ours = added(tiny_whole(folder), NAMED[what], adapter=adapter)
    assert {name: weight.shape for name, weight in ours.items()} == {
        name.removeprefix(PREFIX): weight.shape for name, weight in saved.items()
    }


def test_adapters_whose_names_begin_alike_are_told_apart(trunk: TrunkSegment) -> None:
    first, tenth = (added(trunk.causal_lm, Q_AND_DOWN, seed, f"slot{seed}") for seed in (1, 10))
    assert first.keys() == tenth.keys()
    assert same(weights_of(trunk.causal_lm, "slot1"), first)
    assert not same(first, tenth)


# ---------------------------------------------------------------- several adapters on one trunk


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """All that is not an adapter's, by the names it has without one."""
    everything = [*model.named_parameters(), *model.named_buffers()]
    return {
        name.replace(".base_layer", ""): tensor.detach().clone()
        for name, tensor in everything
        if "lora_" not in name
    }


def random_like(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (0.1 * torch.randn(weight.shape, generator=generator)).requires_grad_()
        for name, weight in weights.items()
    }


def run(trunk: TrunkSegment) -> Tensor:
    return trunk(HIDDEN_BTD, position_ids=torch.arange(5)[None])


def alone(folder: Path, settings: LoraSettings, weights: Mapping[str, Tensor]) -> Tensor:
    """What this one adapter gives, PEFT's way, on a trunk of its own."""
    trunk = a_trunk(folder)
    add_lora(trunk.causal_lm, settings, "default", seed=0)
    with torch.no_grad():
        for name, weight in weights_of(trunk.causal_lm, "default").items():
            weight.copy_(weights[name])
        return run(trunk)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("second", [Q_AND_DOWN, ALL], ids=["other layers", "the same layers"])
def test_adapters_bound_in_turns_give_what_each_gives_alone(
    folder: Path, trunk: TrunkSegment, second: LoraSettings, dora: bool
) -> None:
    slots, chosen, bare = (
        LoraSlots(trunk.causal_lm),
        {"a": replace(ALL, use_dora=dora), "b": second},
        run(trunk),
    )
    weights = {slot: random_like(slots.add(slot, chosen[slot], seed=0), ord(slot)) for slot in chosen}
    expected = {slot: alone(folder, chosen[slot], weights[slot]) for slot in chosen}
    assert not torch.equal(expected["a"], expected["b"])
    for slot in ("a", "b", None, "b", "a", "a"):
        slots.bind(slot, weights.get(slot))
        assert torch.equal(run(trunk), bare if slot is None else expected[slot])


def test_a_trunk_without_an_adapter_bound_is_bitwise_the_one_that_never_had_one(trunk: TrunkSegment) -> None:
    bare, slots = run(trunk), LoraSlots(trunk.causal_lm)
    weights = slots.add("a", ALL, seed=0)
    assert torch.equal(run(trunk), bare), "adding binds nothing"
    slots.bind("a", random_like(weights, 1))
    assert not torch.equal(run(trunk), bare)
    slots.bind(None)
    assert torch.equal(run(trunk), bare)


def test_layers_that_come_drop_nothing_in_a_trunk_that_evaluates(folder: Path, trunk: TrunkSegment) -> None:
    slots, settings = LoraSlots(trunk.causal_lm), replace(ALL, dropout=0.5)
    weights = random_like(slots.add("a", settings, seed=0), 1)
    slots.bind("a", weights)
    assert torch.equal(run(trunk), alone(folder, ALL, weights))


def test_another_version_of_the_same_adapter_can_be_bound(folder: Path, trunk: TrunkSegment) -> None:
    slots = LoraSlots(trunk.causal_lm)
    first = slots.add("a", ALL, seed=0)
    for seed in (1, 2, 1):
        weights = random_like(first, seed)
        slots.bind("a", weights)
        assert torch.equal(run(trunk), alone(folder, ALL, weights))


def test_a_graph_keeps_the_version_it_was_built_with(trunk: TrunkSegment) -> None:
    slots = LoraSlots(trunk.causal_lm)
    older, newer = (random_like(slots.add(slot, ALL, seed=0), 1) for slot in "ab")
    slots.bind("a", older)
    expected = torch.autograd.grad(run(trunk).sum(), list(older.values()))
    slots.bind("a", older)
    graph = run(trunk).sum()
    slots.bind("b", newer)
    run(trunk)
    slots.add("c", ALL, seed=0)
    slots.remove("a")
    assert all(map(torch.equal, torch.autograd.grad(graph, list(older.values())), expected))


def test_the_layers_of_an_adapter_that_is_not_bound_hold_nothing(trunk):
    slots = LoraSlots(trunk.causal_lm)
    weights = {slot: random_like(slots.add(slot, ALL, seed=0), ord(slot)) for slot in "ab"}
    assert not held(trunk)
    for slot in "aba":
        slots.bind(slot, weights[slot])
        assert held(trunk) == {each.data_ptr() for each in weights[slot].values()}
    slots.bind(None)
    assert not held(trunk)
    slots.remove("a")
    slots.bind("b", weights["b"])


def held(trunk: TrunkSegment) -> set[int]:
    return {each.data_ptr() for name, each in trunk.named_parameters() if "lora_" in name}


def test_an_adapter_that_comes_or_goes_leaves_the_others(folder: Path, trunk: TrunkSegment) -> None:
    bare, slots = run(trunk), LoraSlots(trunk.causal_lm)
    held = random_like(slots.add("a", ALL, seed=0), 1)
    slots.bind("a", held)
    before = run(trunk)
    slots.add("b", ALL, seed=0)
    for _ in range(2):
        assert torch.equal(run(trunk), bare), "none is bound after a change"
        slots.bind("a", held)
        after = run(trunk)
        assert torch.equal(after, before)
        gradients = torch.autograd.grad(after.sum(), list(held.values()))
        assert all(gradient.any() for gradient in gradients)
        if "b" in slots._places:
            slots.remove("b")
    slots.remove("a")
    assert torch.equal(run(trunk), bare)
    assert not [name for name, _ in trunk.named_parameters() if "lora_" in name]


def test_the_first_weights_are_copies(folder: Path, trunk: TrunkSegment) -> None:
    weights = LoraSlots(trunk.causal_lm).add("a", ALL, seed=0)
    for weight in weights.values():
        weight.fill_(1.0)
    assert not same(weights_of(trunk.causal_lm, "a"), weights)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_is_float32_beside_a_model_in_half_precision_as_pefts_is(folder: Path, dora: bool) -> None:
    settings, half = replace(ALL, use_dora=dora), {"dtype": torch.bfloat16}
    peft = get_peft_model(tiny_whole(folder, **half), config_of(settings))
    expected = {
        name.removeprefix(PREFIX): weight.detach() for name, weight in weights_of(peft, "default").items()
    }
    draw(expected, seed=0)
    assert {weight.dtype for weight in expected.values()} == {torch.float32}
    assert same(added(tiny_whole(folder, **half), settings), expected)


def test_first_weights_in_a_trunk_in_half_precision_are_not_rounded(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    trunks = (load_trunk(checkpoint, CUT, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert same(*(LoraSlots(trunk.causal_lm).add("a", ALL, seed=0) for trunk in trunks))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_base_is_untouched_after_an_adapter_was_trained(trunk: TrunkSegment, dora: bool) -> None:
    before, slots = base_of(trunk), LoraSlots(trunk.causal_lm)
    weights = random_like(slots.add("a", replace(ALL, use_dora=dora), seed=0), 1)
    assert same(base_of(trunk), before)
    slots.bind("a", weights)
    optimizer = torch.optim.AdamW([*weights.values()], lr=0.1)
    started = copy.deepcopy(weights)
    run(trunk).pow(2).sum().backward()
    optimizer.step()
    assert not any(torch.equal(weights[name], started[name]) for name in weights)
    assert all(each.grad is None for name, each in trunk.named_parameters() if "lora_" not in name)
    assert same(base_of(trunk), before)
    slots.remove("a")
    assert same(base_of(trunk), before)


@pytest.mark.parametrize(
    "targets", [("no_such_layer",), (), ("self_attn",), ("q_proj", "mlp"), ("input_layernorm",)]
)
def test_an_adapter_that_fits_no_layer_is_refused_and_leaves_nothing(
    trunk: TrunkSegment, targets: tuple[str, ...]
) -> None:
    bare, slots = run(trunk), LoraSlots(trunk.causal_lm)
    with pytest.raises(AdapterError, match="LoRA cannot be added"):
        slots.add("a", replace(Q_AND_DOWN, target_modules=targets, use_dora=True), seed=0)
    assert torch.equal(run(trunk), bare)
    assert not [name for name, _ in trunk.named_parameters() if "lora_" in name]
    slots.add("a", Q_AND_DOWN, seed=0)
