"""What of a call is sent beside its activation: mask and positions, where they say something."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from splitlearn.client.call_context import Call
from splitlearn.errors import UnsupportedCall
from splitlearn.wire.host_memory import to_host

# B rows   T new tokens   D hidden


def without_cache(activation_BTD: Tensor, call: Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a forward of whole sequences sends: activation, mask and positions, the latter two if they say
    more than that every token counts and stands where it stands.
    """
    sent_BTD = to_host(activation_BTD)
    mask_BT = call.mask_BL
    is_padded = mask_BT is not None and not bool(mask_BT.all())
    return (
        sent_BTD,
        mask_BT.cpu().bool() if mask_BT is not None and is_padded else None,
        positions_to_send(call, sent_BTD, 0),
    )


def require_in_step(cache: Cache, trunk: range, length: int) -> None:
    """A call that failed at the trunk leaves the bottom's cache with tokens that the trunk's lacks.

    To go on would give a plausible, wrong answer.
    """
    below = cache.layers[trunk.start - 1].get_seq_length()
    if below != length:
        raise UnsupportedCall(
            f"past_key_values is torn: the bottom holds {below} tokens, the trunk would hold {length}, "
            "because an earlier call failed halfway. Generate again from the prompt"
        )


def positions_to_send(call: Call, activation_BTD: Tensor, start: int) -> Tensor | None:
    """None where the positions go on from the session's length, as they mostly do."""
    if call.positions_BT is None:
        return None
    rows, tokens = activation_BTD.shape[:2]
    if call.positions_BT.numel() == 1 and call.positions_BT.item() == start:
        return None
    positions_BT = call.positions_BT.cpu().expand(rows, tokens)
    goes_on = torch.arange(start, start + tokens).expand(rows, tokens)
    return None if torch.equal(positions_BT, goes_on) else positions_BT
