"""The one remote layer: sends the activation at the lower cut, gives back the one at the upper cut."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from splitlearn.client.call_context import Call, CallContext
from splitlearn.client.remote_cache import session_of
from splitlearn.client.transport import Transport
from splitlearn.config import ClientConfig
from splitlearn.errors import NotServed, UnsupportedCall
from splitlearn.vocabulary import StepKey, Timings
from splitlearn.wire.messages import AnswerMessage, StepMessage

# B rows   T new tokens   D hidden


class RemoteTrunk(nn.Module):
    """Stands at index k of the client's layers and holds no weight.

    Raises (from `forward`): whatever the trunk answers with, by the step's deadline.
    """

    def __init__(self, transport: Transport, trunk: range, config: ClientConfig) -> None:
        super().__init__()
        self.transport = transport
        self.last_timings = Timings()
        self._trunk = trunk
        self._config = config
        self._context: CallContext | None = None
        self._lone_steps = count(1)

    def listen_to(self, context: CallContext) -> None:
        """Take masks, positions and cache from the calls of this decoder."""
        self._context = context

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, **asked: Any) -> Tensor:
        """Activation (B, T, D) at the lower cut -> activation (B, T, D) at the upper cut."""
        assert self._context is not None
        answer_BTD: Tensor = _Remote.apply(hidden_states, self, self._context.call)  # type: ignore[no-untyped-call]
        return answer_BTD

    def exchange(self, activation_BTD: Tensor, call: Call) -> Tensor:
        sent_BTD = activation_BTD.detach().cpu()
        if call.cache is None:
            answer = self._lone_step(sent_BTD, call)
        else:
            session = session_of(call.cache, self._trunk, self.transport)
            _require_in_step(call.cache, self._trunk, session.length + sent_BTD.shape[1])
            positions_BT = _positions_to_send(call, sent_BTD, session.length)
            answer = session.step(sent_BTD, call.mask_BL, positions_BT, self._deadline_s(sent_BTD))
        assert answer.activation_BTD is not None
        self.last_timings = answer.timings
        return answer.activation_BTD.to(activation_BTD.device)

    def _lone_step(self, sent_BTD: Tensor, call: Call) -> AnswerMessage:
        mask_BT = call.mask_BL
        is_padded = mask_BT is not None and not bool(mask_BT.all())
        return self.transport.step(
            StepMessage(
                key=StepKey(step=next(self._lone_steps)),
                activation_BTD=sent_BTD,
                mask_columns_BT=mask_BT.cpu().bool() if mask_BT is not None and is_padded else None,
                positions_BT=_positions_to_send(call, sent_BTD, 0),
                deadline_s=self._deadline_s(sent_BTD),
            )
        )

    def _deadline_s(self, activation_BTD: Tensor) -> float:
        rows, tokens = activation_BTD.shape[:2]
        is_decode = rows * tokens <= self._config.decode_tokens
        return self._config.decode_s if is_decode else self._config.prefill_s


class _Remote(torch.autograd.Function):
    """Says clearly that this version cannot train, where a gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, activation_BTD: Tensor, remote: RemoteTrunk, call: Call) -> Tensor:
        return remote.exchange(activation_BTD, call)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotServed("the trunk gives no gradients yet: this version generates and does not train")


def _require_in_step(cache: Cache, trunk: range, length: int) -> None:
    """A call that failed at the trunk leaves the bottom's cache with tokens that the trunk's lacks.

    To go on would give a plausible, wrong answer.
    """
    below = cache.layers[trunk.start - 1].get_seq_length()
    if below != length:
        raise UnsupportedCall(
            f"past_key_values is torn: the bottom holds {below} tokens, the trunk would hold {length}, "
            "because an earlier call failed halfway. Generate again from the prompt"
        )


def _positions_to_send(call: Call, activation_BTD: Tensor, start: int) -> Tensor | None:
    """None where the positions go on from the session's length, as they mostly do."""
    if call.positions_BT is None:
        return None
    rows, tokens = activation_BTD.shape[:2]
    if call.positions_BT.numel() == 1 and call.positions_BT.item() == start:
        return None
    positions_BT = call.positions_BT.cpu().expand(rows, tokens)
    goes_on = torch.arange(start, start + tokens).expand(rows, tokens)
    return None if torch.equal(positions_BT, goes_on) else positions_BT
