"""The adapters of bottom and top on a client whose cohort trains them like the trunk's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from splitlearn.errors import SettingError


class SharedEnds:
    """By the names in a PEFT file less its prefix; what crosses the wire is float32."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = dict(weights)

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
