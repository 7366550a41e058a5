"""Attention of one new token a row, where a group of heads shares its keys and values.

Where there is a mask, the library (5.17) copies each key for every head of its group before it attends. For
one token that copy is most of the work: here the heads of a group attend as rows of one query.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# B rows   H heads   G key/value heads   N heads of a group   T new tokens   K columns   E head size

DECODE = "splitlearn_decode"
OTHERWISE = ("softcap", "position_bias", "s_aux")
"""What the library's own attention is asked about in vain, or in its own way."""


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """(B, T, H, E) from query (B, H, T, E), key and value (B, G, K, E): what the library's `sdpa` gives."""
    rows, heads, tokens, size = query.shape
    groups = key.shape[1]
    asks_more = any(others.get(name) is not None for name in OTHERWISE)
    shared_mask = attention_mask is None or attention_mask.shape[1] == 1
    if tokens > 1 or asks_more or not shared_mask:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        answer: tuple[Tensor, Tensor | None] = sdpa(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return answer
    query_BGNE = query.reshape(rows, groups, heads // groups, size)
    mixed_BGNE = scaled_dot_product_attention(query_BGNE, key, value, attention_mask, scale=scaling)
    return mixed_BGNE.reshape(rows, 1, heads, value.shape[-1]), None


@contextmanager
def attending_to_one_token(model: PreTrainedModel) -> Iterator[None]:
    """Within it, layers of this model that attend with the library's `sdpa` attend as above.

    Families that do not ask the library for an attention function (falcon) read the name themselves: to
    them it says which form their mask has.
    """
    config, chosen = model.config, model.config._attn_implementation
    if chosen != "sdpa" or not model._supports_attention_backend:
        yield
        return
    config._attn_implementation = DECODE
    try:
        yield
    finally:
        config._attn_implementation = chosen


AttentionInterface.register(DECODE, decode_attention)
