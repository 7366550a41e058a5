"""Rows of one batch compute each with its own adapter, and give what PEFT gives each alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitlearn.model.families import family_of
from splitlearn.model.lora import LoraSlots
from splitlearn.model.lora_bank import BARE_PLACE, LoraBank, PlainLora
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.testing.tiny import PROVEN, tiny_config, tiny_whole
from splitlearn.vocabulary import LoraSettings

ROWS, TOKENS, HIDDEN = 5, 4, 32
HIDDEN_BTD = torch.randn(ROWS, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5))
ALL = LoraSettings(r=4, alpha=16.0, target_modules=("all-linear",))
FEW = {
    "gpt2": ("c_attn",),
    "phi3": ("qkv_proj", "down_proj"),
    "gpt_oss": ("q_proj", "o_proj"),
    "phi": ("q_proj", "fc2"),
    "opt": ("q_proj", "fc2"),
    "gptj": ("q_proj", "fc_out"),
    "starcoder2": ("q_proj", "c_fc"),
    "gpt_neox": ("query_key_value",),
    "falcon": ("query_key_value",),
    "mixtral": ("q_proj", "o_proj"),
    "qwen2_moe": ("q_proj", "shared_expert_gate"),
    "qwen3_moe": ("q_proj", "o_proj"),
    "deepseek_v3": ("q_a_proj", "kv_b_proj"),
}
FUSED_EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")
"""All linear layers of these are more than plain LoRA."""
OFTEN = ("llama", "gpt2", "phi3", "qwen2_moe")
BATCHED = [
    family if family in OFTEN else pytest.param(family, marks=pytest.mark.slow)
    for family in PROVEN
    if family_of(tiny_config(family)).batched
]
MIXED = [2, BARE_PLACE, 1, 3, 1]
CLOSE = 1e-5
whole_of = cache(tiny_whole)


@dataclass
class Mixture:
    """A trunk with several adapters, by their place, and the bank of them."""

    trunk: TrunkSegment
    slots: LoraSlots
    weights: dict[int, dict[str, Tensor]]
    bank: LoraBank

    def run(self, rows: slice = slice(None)) -> Tensor:
        with torch.inference_mode():
            hidden_BTD = HIDDEN_BTD[rows].to(self.trunk.dtype)
            return self.trunk(hidden_BTD, position_ids=torch.arange(TOKENS)[None])

    def mixed(self, places: list[int]) -> Tensor:
        self.slots.bind(None)
        with self.bank.bound(torch.tensor(places)):
            return self.run()

    def each_alone(self, places: list[int]) -> Tensor:
        rows = []
        for row, place in enumerate(places):
            slot = None if place == BARE_PLACE else f"slot{place}"
            self.slots.bind(slot, self.weights.get(place))
            rows.append(self.run(slice(row, row + 1)))
        self.slots.bind(None)
        return torch.cat(rows)


def settings_for(family: str) -> list[LoraSettings]:
    """Other ranks, alphas, scalings and targets."""
    few = FEW.get(family, ("q_proj", "down_proj"))
    many = replace(ALL, target_modules=few) if family in FUSED_EXPERTS else ALL
    return [
        many,
        LoraSettings(r=3, alpha=1.0, target_modules=few[:1], use_rslora=True),
        replace(many, r=8, rank_pattern={few[0]: 2}, alpha_pattern={few[0]: 5.0}, dropout=0.5),
    ]


def mixture(folder: Path, settings: list[LoraSettings], dtype: str = "float32") -> Mixture:
    whole = whole_of(folder) if dtype == "float32" else tiny_whole(folder, dtype=getattr(torch, dtype))
    trunk = TrunkSegment.of_whole(whole, SplitPlan(6, 2, 2)).eval()
    slots, weights = LoraSlots(trunk.causal_lm), {}
    for place, each in enumerate(settings, 1):
        weights[place] = random_like(slots.add(f"slot{place}", each, seed=0), place)
    adapters = {place: slots.plain(f"slot{place}") for place in weights}
    bank = LoraBank(largest(adapters.values()), places=len(weights) + 1)
    with torch.inference_mode():
        for place, adapter in adapters.items():
            bank.put(place, adapter, weights[place])
    return Mixture(trunk, slots, weights, bank)


def largest(adapters) -> dict[str, PlainLora]:
    layers: dict[str, PlainLora] = {}
    for adapter in adapters:
        for name, layer in adapter.items():
            layers[name] = max(layer, layers.get(name, layer), key=lambda each: each.rank)
    return layers


def random_like(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Of the row that is furthest off, relative to its own largest value."""
    by_row = (ours - theirs).abs().flatten(1).amax(1) / theirs.abs().flatten(1).amax(1)
    return float(by_row.max())


@pytest.mark.parametrize("family", BATCHED)
def test_each_row_gives_what_its_adapter_gives_alone(folder_of: Callable[..., Path], family: str) -> None:
    """Fused projections, transposed weights, and experts beside which rows and tokens are one dimension."""
    made = mixture(folder_of(family), settings_for(family))
    expected = made.each_alone(MIXED)
    assert apart(made.mixed(MIXED), expected) <= CLOSE
    for others in ([1, 3, 2, BARE_PLACE, 3], MIXED[::-1], [BARE_PLACE] * ROWS):
        if others != MIXED:
            assert apart(made.mixed(others), expected) > 100 * CLOSE, "the rows' own adapters make it equal"


def test_rows_of_the_bare_place_are_the_bare_trunks(folder_of: Callable[..., Path]) -> None:
    made = mixture(folder_of("llama"), settings_for("llama"))
    bare = [BARE_PLACE] * ROWS
    assert (
        torch.equal(made.mixed(bare), made.each_alone(bare))
        or apart(made.mixed(bare), made.each_alone(bare)) <= CLOSE
    )


def test_a_bank_that_is_no_longer_bound_leaves_no_trace(folder_of: Callable[..., Path]) -> None:
    made = mixture(folder_of("llama"), settings_for("llama"))
    bare = made.run()
    made.slots.bind("slot1", made.weights[1])
    alone = made.run()
    with pytest.raises(ValueError, match="on the way"), made.bank.bound(torch.tensor(MIXED)):
        raise ValueError("on the way")
    assert torch.equal(made.run(), alone)
    made.slots.bind(None)
    assert torch.equal(made.run(), bare)


def test_a_place_that_is_given_anew_has_nothing_of_the_adapter_before(folder_of: Callable[..., Path]) -> None:
    made = mixture(folder_of("llama"), settings_for("llama"))
    with torch.inference_mode():
        made.bank.put(1, made.slots.plain("slot2"), made.weights[2])
        made.bank.put(3, made.slots.plain("slot2"), made.weights[2])
    places = [2, BARE_PLACE, 2, 2, 2]
    assert apart(made.mixed(MIXED), made.each_alone(places)) <= CLOSE


def test_weights_that_are_no_numbers_reach_their_own_rows_only(folder_of: Callable[..., Path]) -> None:
    made = mixture(folder_of("llama"), settings_for("llama"))
    expected = made.each_alone(MIXED)
    broken = {name: torch.full_like(weight, torch.nan) for name, weight in made.weights[1].items()}
    with torch.inference_mode():
        made.bank.put(1, made.slots.plain("slot1"), broken)
    found = made.mixed(MIXED)
    for row, place in enumerate(MIXED):
        assert (
            found[row].isnan().all()
            if place == 1
            else apart(found[row : row + 1], expected[row : row + 1]) <= CLOSE
        )


def test_in_half_precision_a_row_differs_by_rounding_alone(folder_of: Callable[..., Path]) -> None:
    """Adapters are float32 beside such a model, in the bank as in PEFT."""
    made = mixture(folder_of("llama"), settings_for("llama"), "bfloat16")
    assert made.mixed(MIXED).dtype == torch.bfloat16
    expected = made.each_alone(MIXED).float()
    assert apart(made.mixed(MIXED).float(), expected) <= 0.02
    assert apart(made.mixed(MIXED[::-1]).float(), expected) > 0.1


def test_its_bytes_are_those_of_its_places(folder_of: Callable[..., Path]) -> None:
    made = mixture(folder_of("llama"), [replace(ALL, target_modules=("q_proj",), r=5)])
    assert made.bank.bytes == 2 * 2 * 5 * (32 + 32) * 4, "two layers, two places, rank 5, float32"


NOT_PLAIN = {
    "DoRA": ("llama", replace(ALL, use_dora=True)),
    "fused experts": ("mixtral", ALL),
    "a router": ("qwen3_moe", ALL),
}


@pytest.mark.parametrize("what", NOT_PLAIN)
def test_what_is_more_than_lora_of_rows_is_not_banked(folder_of: Callable[..., Path], what: str) -> None:
    family, settings = NOT_PLAIN[what]
    trunk = TrunkSegment.of_whole(whole_of(folder_of(family)), SplitPlan(6, 2, 2)).eval()
    slots = LoraSlots(trunk.causal_lm)
    slots.add("slot1", settings, seed=0)
    assert slots.plain("slot1") is None
    slots.add("slot2", replace(settings, use_dora=False, target_modules=("q_proj",)), seed=0)
    assert len(slots.plain("slot2")) == 2
    slots.remove("slot2")
    assert slots.plain("slot2") is None
