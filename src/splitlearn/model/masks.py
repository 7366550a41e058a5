"""The batch's masks, asked for by the family itself.

Every family's forward asks the library for its masks (causal, sliding, chunked), and the library
asks a function that is registered under the name of the attention implementation. The trunk's
decoder names ours. Alone, a session gets exactly the library's mask. In a ragged batch, where each
row is at its own position, ours puts the family's own rule to each row's positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from splitlearn.errors import UnsupportedModel

# B rows   T new tokens   K cache columns

SLOTS = "splitlearn_slots"
FORMS = ("sdpa", "eager")
"""Attention implementations whose form of mask is known here; no other runs in a ragged batch."""

_KNOWN = frozenset(
    {
        "batch_size",
        "q_length",
        "kv_length",
        "q_offset",
        "kv_offset",
        "mask_function",
        "attention_mask",
        "local_size",
        "allow_is_causal_skip",
        "use_vmap",
        "dtype",
        "device",
        "config",
    }
)
"""What the library may tell about a mask that is understood here."""


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Where each row's new tokens lie in the cache, and which cache columns each row may see."""

    positions_BT: Tensor
    key_mask_BK: Tensor | None = None


_batch: ContextVar[RaggedBatch | None] = ContextVar("ragged_batch", default=None)


@contextmanager
def ragged(positions_BT: Tensor, key_mask_BK: Tensor | None = None) -> Iterator[None]:
    """Within it, this thread's trunk runs rows of different length together.

    `positions_BT` is the index in the cache of each new token; `key_mask_BK` is true for the
    columns that a row may see beyond what its family's rule allows (None: all of them).
    """
    token = _batch.set(RaggedBatch(positions_BT, key_mask_BK))
    try:
        yield
    finally:
        _batch.reset(token)


def with_slot_masks(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy for the decoder alone: its masks come from here, its layers attend as before."""
    own = copy.deepcopy(config)
    own.splitlearn_attention = config._attn_implementation
    own._attn_implementation = SLOTS
    return own


def slot_mask(**asked: Any) -> Any:
    """What the library calls for each kind of mask that a family's forward asks for."""
    batch = _batch.get()
    implementation = asked["config"].splitlearn_attention
    if batch is None:
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](**asked)
    _check_known(implementation, asked)
    seen_B1TK = _seen(batch, **asked)
    return seen_B1TK if implementation == "sdpa" else _additive(seen_B1TK, asked["dtype"])


def _seen(
    batch: RaggedBatch,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any,
    kv_offset: int = 0,
    **_: Any,
) -> Tensor:
    """The family's rule by broadcasting: true where a row's token may look at a column."""
    positions_BT, key_mask_BK = batch.positions_BT, batch.key_mask_BK
    _check_shape("positions", positions_BT, (batch_size, q_length))
    device = positions_BT.device
    columns_K = torch.arange(kv_length, device=device) + kv_offset
    seen_B1TK: Tensor = mask_function(
        torch.arange(batch_size, device=device)[:, None, None, None],
        torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device),
        positions_BT[:, None, :, None],
        columns_K[None, None, None, :],
    )
    if key_mask_BK is not None:
        _check_shape("key mask", key_mask_BK, (batch_size, kv_length))
        seen_B1TK = seen_B1TK & key_mask_BK[:, None, None, :]
    return seen_B1TK.expand(batch_size, 1, q_length, kv_length)


def _additive(seen_B1TK: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=seen_B1TK.device)
    return torch.where(seen_B1TK, zero, torch.finfo(dtype).min)


def _check_known(implementation: str, asked: dict[str, Any]) -> None:
    """What is not known here raises: a mask that is nearly right would pass in silence."""
    unknown = sorted(asked.keys() - _KNOWN)
    if implementation not in FORMS:
        unknown.append(f"attention implementation {implementation}")
    if asked.get("use_vmap"):
        unknown.append("a mask of the family's own making")
    # opt on 5.17 makes itself a mask of ones where it is given none.
    given = asked.get("attention_mask")
    if given is not None and not given.all():
        unknown.append("a 2-D mask (give the key mask to `ragged` instead)")
    if unknown:
        raise UnsupportedModel(
            f"a batch of rows of different length does not know {', '.join(unknown)}; "
            "run these sessions one by one"
        )


def _check_shape(what: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    assert tuple(tensor.shape) == wanted, f"{what} {tuple(tensor.shape)}, the batch is {wanted}"


AttentionMaskInterface.register(SLOTS, slot_mask)
