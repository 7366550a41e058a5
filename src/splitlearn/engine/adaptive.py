"""Server optimizers of federated learning: `fedadam` and `fedyogi`, over merged gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Adaptive(Optimizer):
    """Reddi et al. 2021 ("Adaptive Federated Optimization"), algorithm 2; its Delta is the negative gradient.

    Unlike in Adam the moments are not corrected for their start: m begins with 0, v with `epsilon` squared,
    and `epsilon` (the paper's tau, there 1e-3 at best) is no mere guard against division by zero: it says how
    adaptive the steps are. The paper's betas are 0.9 and 0.99.

    Args:
        weights: float32, as all optimizers' of the trunk are.

    Raises:
        ValueError: a constant is out of its range; weight decay is asked for, which the paper has none of.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        epsilon: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}: each lies between 0 and 1, 1 excluded")
        if epsilon <= 0:
            raise ValueError(f"epsilon is {epsilon}: it must be above 0, 1e-3 is a good start")
        if weight_decay:
            raise ValueError(f"weight_decay is {weight_decay}: there is none, set it to 0")
        super().__init__(weights, {"lr": lr, "betas": betas, "epsilon": epsilon})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move each weight that has a gradient."""
        assert closure is None, "the trunk's gradients are there already"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group)

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.full_like(weight, group["epsilon"] ** 2)
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        self._follow(state["exp_avg_sq"], gradient * gradient, beta2)
        weight.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt() + group["epsilon"], value=-group["lr"])

    @staticmethod
    def _follow(second: Tensor, squared: Tensor, beta2: float) -> None:
        raise NotImplementedError


class FedAdam(Adaptive):
    """v moves towards the squared gradient by a part of the way."""

    @staticmethod
    def _follow(second: Tensor, squared: Tensor, beta2: float) -> None:
        second.lerp_(squared, 1 - beta2)


class FedYogi(Adaptive):
    """v moves towards the squared gradient by a part of that square: it forgets large gradients slowly."""

    @staticmethod
    def _follow(second: Tensor, squared: Tensor, beta2: float) -> None:
        second.sub_(squared * torch.sign(second - squared), alpha=1 - beta2)
