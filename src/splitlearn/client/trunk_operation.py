"""The trunk as one operation of autograd: its forward and its backward are calls over the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from splitlearn.client.call_context import Call
from splitlearn.client.run import ClientRun
from splitlearn.client.sent import without_cache
from splitlearn.errors import UnsupportedCall
from splitlearn.wire.host_memory import to_host

if TYPE_CHECKING:
    from splitlearn.client.remote_trunk import RemoteTrunk

# B rows   T new tokens   D hidden

NO_RUN = (
    "this model was loaded to generate: load it with lora=LoraConfig(...) to train it, "
    "or with freeze=['trunk'] to train bottom and top alone"
)
WITH_CACHE = "a forward with a cache gives no gradients: call the model with use_cache=False"


class Untrained(torch.autograd.Function):
    """Says clearly what is missing, where a gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, activation_BTD: Tensor, remote: RemoteTrunk, call: Call) -> Tensor:
        ctx.why_not = NO_RUN if remote.planned is None else WITH_CACHE
        return remote.exchange(activation_BTD, call)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UnsupportedCall(ctx.why_not)


class Trained(torch.autograd.Function):
    """The trunk as one operation: its forward here, its backward there."""

    @staticmethod
    def forward(
        ctx: Any, activation_BTD: Tensor, anchor: Tensor, remote: RemoteTrunk, run: ClientRun, call: Call
    ) -> Tensor:
        sent_BTD, mask_BT, positions_BT = without_cache(activation_BTD, call)
        ctx.run = run
        ctx.asked, answer_BTD = run.forward(
            sent_BTD,
            mask_BT,
            positions_BT,
            training=remote.training,
            want_input_gradient=ctx.needs_input_grad[0],
        )
        return answer_BTD.to(activation_BTD.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        if getattr(ctx, "went_back", False):
            raise UnsupportedCall(
                "the trunk gives one gradient a forward: add the losses before backward, or forward again"
            )
        ctx.went_back = True
        gradient_BTD = ctx.run.backward(ctx.asked, to_host(gradients[0]))
        return None if gradient_BTD is None else gradient_BTD.to(gradients[0].device), None, None, None, None
