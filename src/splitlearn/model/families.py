"""Which families are proven to be cut exactly, and which are refused, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from splitlearn.errors import UnsupportedModel
from splitlearn.model.plainness import why_not_plain


@dataclass(frozen=True, slots=True)
class Family:
    """A row of the table: whether sessions of different length may run in one batch, or why not."""

    model_type: str
    batched: bool = True
    reason: str = ""


ALIBI = "ALiBi: the bias is made from the batch's longest row, not from each row's own positions"
LONGROPE = "longrope: the batch's furthest position decides how all its rows are rotated"
NOT_IN_TABLE = "not in the table of families proven in a batch"

PROVEN = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3"),
        Family("gemma"),
        Family("gemma2"),
        Family("gemma3_text"),
        Family("phi"),
        Family("phi3"),
        Family("gpt2"),
        Family("opt"),
        Family("gpt_neox"),
        Family("gptj"),
        Family("olmo2"),
        Family("cohere"),
        Family("cohere2"),
        Family("granite"),
        Family("smollm3"),
        Family("stablelm"),
        Family("starcoder2"),
        Family("glm4"),
        Family("falcon"),
        Family("mixtral"),
        Family("qwen2_moe"),
        Family("qwen3_moe"),
        Family("gpt_oss"),
        Family("deepseek_v3"),
        Family("bloom", batched=False, reason=ALIBI),
        Family("mpt", batched=False, reason=ALIBI),
    )
}

STATE_SPACE = "its state-space, linear-attention or convolution layers keep a state of another kind"
NOT_EXACT = "its layers are not proven to be cut exactly"

REFUSED = {
    "llama4_text": NOT_EXACT,
    "trocr": "it is the decoder of an image model",
    "mamba": STATE_SPACE,
    "mamba2": STATE_SPACE,
    "falcon_mamba": STATE_SPACE,
    "rwkv": STATE_SPACE,
    "recurrent_gemma": STATE_SPACE,
    "jamba": STATE_SPACE,
    "bamba": STATE_SPACE,
    "zamba": STATE_SPACE,
    "zamba2": STATE_SPACE,
    "nemotron_h": STATE_SPACE,
    "falcon_h1": STATE_SPACE,
    "granitemoehybrid": STATE_SPACE,
    "lfm2": STATE_SPACE,
    "lfm2_moe": STATE_SPACE,
    "qwen3_next": STATE_SPACE,
    "qwen3_5_text": STATE_SPACE,
    "qwen3_5_moe_text": STATE_SPACE,
    "minimax": STATE_SPACE,
    "xlstm": STATE_SPACE,
}

_MORE_THAN_TEXT = frozenset({"vision_config", "audio_config"})
ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def family_of(config: PreTrainedConfig) -> Family:
    """The model's row; what is not proven is refused here, before any weight is opened."""
    reason = _why_refused(config)
    if reason:
        raise UnsupportedModel(f"{config.model_type} is not supported: {reason}")
    family = PROVEN.get(config.model_type) or _unlisted(config)
    if config.model_type == "falcon" and config.alibi:
        return Family("falcon", batched=False, reason=ALIBI)
    if "longrope" in _rope_types(config):
        return Family(config.model_type, batched=False, reason=LONGROPE)
    return family


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The library's own class for this configuration."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(
            f"{config.model_type} is not supported: transformers has no causal LM class for it"
        )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _unlisted(config: PreTrainedConfig) -> Family:
    """A decoder-only class that the table lacks is taken if its layers are plain."""
    reason = why_not_plain(causal_lm_class(config), config)
    if reason:
        raise UnsupportedModel(f"{config.model_type} is not supported: {reason}")
    return Family(config.model_type, batched=False, reason=NOT_IN_TABLE)


def _why_refused(config: PreTrainedConfig) -> str:
    """The first reason that the configuration alone gives."""
    if _says(config, "quantization_config"):
        return "its checkpoint is quantised; use the model's unquantised checkpoint"
    if _says(config, "is_encoder_decoder"):
        return "it has an encoder beside its decoder"
    if config.get_text_config() is not config or _MORE_THAN_TEXT & config.sub_configs.keys():
        return (
            "it takes more than text (images or sound), which would cross the cut; "
            "use its text-only checkpoint"
        )
    if not _says(config, "num_hidden_layers"):
        return "its configuration names no number of layers"
    if _says(config, "hidden_size_per_layer_input") or _says(config, "num_kv_shared_layers"):
        return "its layers share keys and values or take per-layer inputs, which cross the cut"
    if _says(config, "add_cross_attention"):
        return "its layers attend to an encoder"
    if _says(config, "use_bidirectional_attention") or not getattr(config, "is_causal", True):
        return "its attention looks ahead"
    if "dynamic" in _rope_types(config):
        return "how far its rotary positions are stretched (dynamic) depends on what ran before"
    if config.model_type in REFUSED:
        return REFUSED[config.model_type]
    other = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION_KINDS)
    if other:
        return f"its layers are of a kind that is not proven ({', '.join(other)})"
    return ""


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """Told once, or once for each type of layer."""
    told: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [each for each in told.values() if isinstance(each, dict)]
    return {each.get("rope_type", "default") for each in by_layer_type or [told]}


def _says(config: PreTrainedConfig, name: str) -> bool:
    value: Any = getattr(config, name, None)
    return bool(value)
