"""Tiny random models of every family: the real classes, six layers, a few kilobytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LAYERS = 6
VOCABULARY = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ONE_HEAD_EACH = {"num_key_value_heads": 4}
_ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_EVERY_THIRD_FULL = ["sliding_attention", "sliding_attention", "full_attention"] * (LAYERS // 3)


def _like(**own: Any) -> dict[str, Any]:
    return _COMMON | own


def _without_groups(**own: Any) -> dict[str, Any]:
    return {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"} | own


PROVEN: dict[str, dict[str, Any]] = {
    "llama": _like(),
    "mistral": _like(head_dim=8, sliding_window=8),
    "qwen2": _like(),
    "qwen3": _like(head_dim=8),
    "gemma": _like(head_dim=8),
    "gemma2": _like(head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3_text": _like(
        head_dim=8, sliding_window=8, query_pre_attn_scalar=8, layer_types=_EVERY_THIRD_FULL
    ),
    "phi": _without_groups(),
    "phi3": _like(),
    "gpt2": _GPT2,
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 16,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
    "gpt_neox": _without_groups(),
    "gptj": _GPT2 | {"rotary_dim": 4},
    "olmo2": _like(),
    "cohere": _like(),
    "cohere2": _like(sliding_window=8),
    "granite": _like(
        embedding_multiplier=12.0,
        logits_scaling=8.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0625,
    ),
    "smollm3": _like(),
    "stablelm": _like(),
    "starcoder2": _like(),
    "glm4": _like(head_dim=8),
    "falcon": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mixtral": _like(num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _like(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": _like(
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    ),
    "gpt_oss": _like(
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=_ALTERNATING,
    ),
    "deepseek_v3": _like(
        **_ONE_HEAD_EACH,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "bloom": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "n_layer": LAYERS,
        "n_head": 4,
        "pad_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mpt": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 256,
    },
}
"""Every family that is proven to be cut exactly."""

VARIANTS: dict[str, dict[str, Any]] = {
    "falcon(alibi)": PROVEN["falcon"] | {"alibi": True},
    "llama(tied)": PROVEN["llama"] | {"tie_word_embeddings": True},
    "qwen2(window)": PROVEN["qwen2"]
    | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "gpt2(inverse)": PROVEN["gpt2"] | {"scale_attn_by_inverse_layer_idx": True},
    "phi3(longrope)": PROVEN["phi3"]
    | {
        "original_max_position_embeddings": 8,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 8,
        },
    },
    "smollm3(nope)": PROVEN["smollm3"] | {"no_rope_layers": [1, 0, 1, 1, 0, 1]},
}
"""Settings within a family that change what its layers do."""

UNLISTED: dict[str, dict[str, Any]] = {
    "olmo": _like(),
    "nemotron": _like(),
    "olmoe": _like(num_experts=4, num_experts_per_tok=2),
}
"""Plain decoder-only families that the table lacks; they run one by one."""

REFUSED: dict[str, dict[str, Any]] = {
    "llama4_text": _like(
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=8,
    ),
    "gemma3n_text": _like(
        head_dim=8,
        sliding_window=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=2,
        layer_types=_ALTERNATING,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * LAYERS,
    ),
    "gemma4_text": _like(
        head_dim=8,
        global_head_dim=8,
        sliding_window=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=2,
        layer_types=_ALTERNATING,
    ),
    "qwen3_next": _like(
        head_dim=8,
        layer_types=["linear_attention", "full_attention"] * (LAYERS // 2),
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "lfm2": _like(layer_types=["conv", "full_attention"] * (LAYERS // 2)),
    "mamba2": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 1,
        "expand": 2,
    },
    "rwkv": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS},
    "bart": {"vocab_size": VOCABULARY, "d_model": 32},
    "t5": {"vocab_size": VOCABULARY, "d_model": 32},
    "llava": {},
}
"""Families whose cut is not exact, or whose state is of another kind."""

TINY: dict[str, dict[str, Any]] = PROVEN | VARIANTS | UNLISTED | REFUSED


def tiny_config(family: str, **overrides: Any) -> Any:
    """The configuration of a tiny model; what is in brackets names a variant."""
    return AutoConfig.for_model(family.split("(")[0], **(TINY[family] | overrides))


def tiny_model(family: str, folder: str | Path, seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny model with random weights, the same for the same seed, and return its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    whole.save_pretrained(folder)
    return Path(folder)


def tiny_whole(folder: str | Path, **how: Any) -> PreTrainedModel:
    """The whole model in float32, as the library alone loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | how)).eval()
