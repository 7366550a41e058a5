"""The adapters of bottom and top on a client whose cohort trains them like the trunk's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from splitlearn.client.parts import trunk_of, units_in_full
from splitlearn.errors import SettingError
from splitlearn.model.lora import ADAPTER, weights_of


class SharedEnds:
    """By the names in a PEFT file less its prefix; what crosses the wire is float32.

    Raises:
        SettingError: bottom or top is trained in full, or neither has an adapter that is trained.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if whole := units_in_full(model, trunk_of(model)):
            raise SettingError(
                f"share='sync' is for adapters, {min(whole)} is trained in full: leave full= out, or share"
            )
        every = weights_of(model, ADAPTER)
        self._weights = {name: weight for name, weight in every.items() if weight.requires_grad}
        if not self._weights:
            raise SettingError(
                "share='sync' shares the adapters of bottom and top, and both are frozen: leave one of them "
                "out of freeze=, or leave share out"
            )

    def values(self) -> dict[str, Tensor]:
        return {name: weight.detach().float().cpu() for name, weight in self._weights.items()}

    def gradients(self) -> dict[str, Tensor]:
        """Of those that have one."""
        return {
            name: weight.grad.detach().float().cpu()
            for name, weight in self._weights.items()
            if weight.grad is not None
        }

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Take the run's, and let go of the gradients: a local optimizer then passes these weights over.

        Raises:
            SettingError: the run has others.
        """
        theirs = {name: value.shape for name, value in values.items()}
        ours = {name: weight.shape for name, weight in self._weights.items()}
        if theirs != ours:
            differing = min(theirs.items() ^ ours.items())[0]
            raise SettingError(
                f"the run shares other weights of bottom and top than this member trains, first {differing}: "
                "all members give the same cut, lora= and freeze="
            )
        for name, weight in self._weights.items():
            weight.copy_(values[name])
            weight.grad = None
