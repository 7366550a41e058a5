import re

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig

from splitlearn.errors import UnsupportedModel
from splitlearn.model.families import NOT_IN_TABLE, causal_lm_class, family_of
from splitlearn.model.families import PROVEN as TABLE
from splitlearn.model.plainness import why_not_plain
from splitlearn.testing.tiny import PROVEN, REFUSED, UNLISTED, VARIANTS, tiny_config

ONE_BY_ONE = {"bloom": "ALiBi", "mpt": "ALiBi", "falcon(alibi)": "ALiBi", "phi3(longrope)": "longrope"}


def test_every_row_of_the_table_has_a_tiny_model():
    assert set(TABLE) == set(PROVEN)


@pytest.mark.parametrize("name", [*PROVEN, *VARIANTS])
def test_proven_families_run_batched_unless_the_batch_would_change_a_row(name: str):
    family = family_of(tiny_config(name))
    assert family.batched == (name not in ONE_BY_ONE)
    assert family.reason.startswith(ONE_BY_ONE.get(name, ""))


@pytest.mark.parametrize("name", UNLISTED)
def test_plain_families_outside_the_table_run_one_by_one(name: str):
    family = family_of(tiny_config(name))
    assert (family.batched, family.reason) == (False, NOT_IN_TABLE)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama4_text", "not proven"),
        ("gemma3n_text", "share keys and values or take per-layer inputs"),
        ("gemma4_text", "share keys and values or take per-layer inputs"),
        ("qwen3_next", "state-space, linear-attention or convolution"),
        ("lfm2", "state-space, linear-attention or convolution"),
        ("mamba2", "state-space, linear-attention or convolution"),
        ("rwkv", "state-space, linear-attention or convolution"),
        ("bart", "encoder"),
        ("t5", "encoder"),
    ],
)
def test_refusal_says_which_family_and_why(name: str, reason: str):
    assert name in REFUSED
    with pytest.raises(UnsupportedModel, match=f"{name} is not supported: .*{reason}"):
        family_of(tiny_config(name))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantised"),
        ({"num_kv_shared_layers": 2}, "share keys and values"),
        ({"hidden_size_per_layer_input": 8}, "per-layer inputs"),
        ({"layer_types": ["full_attention", "linear_attention"] * 3}, "linear_attention"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "depends on what ran before"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "depends on what ran before"),
        ({"use_bidirectional_attention": True}, "looks ahead"),
        ({"add_cross_attention": True}, "encoder"),
    ],
)
def test_a_proven_family_is_refused_with_settings_that_are_not(settings: dict, reason: str):
    config = tiny_config("llama")
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedModel, match=reason):
        family_of(config)


def test_models_that_take_images_are_refused():
    with pytest.raises(UnsupportedModel, match="more than text"):
        family_of(LlavaConfig(text_config=tiny_config("llama").to_dict()))


def test_a_configuration_without_a_causal_lm_class_is_refused():
    with pytest.raises(UnsupportedModel, match="no causal LM class"):
        causal_lm_class(tiny_config("t5"))


class _OddLayer(nn.Module):
    def forward(self, hidden_states: torch.Tensor, first_value: torch.Tensor) -> torch.Tensor:
        return hidden_states + first_value


class MambaMixer(nn.Module):
    pass


def _with_odd_layer(model: LlamaForCausalLM) -> None:
    model.model.layers[3] = _OddLayer()


def _with_a_state(model: LlamaForCausalLM) -> None:
    model.model.layers[3].mixer = MambaMixer()


def _with_an_extra_part(model: LlamaForCausalLM) -> None:
    model.model.predictor = nn.Linear(2, 2)


def _with_fewer_layers(model: LlamaForCausalLM) -> None:
    model.model.layers = model.model.layers[:4]


def _without_layers(model: LlamaForCausalLM) -> None:
    model.model.layers = nn.Sequential()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_with_odd_layer, "several kinds (LlamaDecoderLayer, _OddLayer)"),
        (_with_a_state, "hold MambaMixer"),
        (_with_an_extra_part, "stands predictor (Linear)"),
        (_with_fewer_layers, "has 4 layers where its configuration says 6"),
        (_without_layers, "has no list of decoder layers"),
    ],
)
def test_what_is_not_plain_is_named(change, reason: str):
    class Changed(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            change(self)

    assert re.search(re.escape(reason), why_not_plain(Changed, tiny_config("llama")))


def test_layers_that_hand_one_another_more_than_the_state_are_not_plain():
    class Changed(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model.layers = nn.ModuleList(_OddLayer() for _ in range(6))

    assert "first_value" in why_not_plain(Changed, tiny_config("llama"))
