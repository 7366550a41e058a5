"""A decode step of the client as two CUDA graphs, around the call to the trunk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# B rows   T 1   D hidden

Across = Callable[[Tensor], Tensor]
"""(B, 1, D) at the lower cut -> (B, 1, D) at the upper cut."""


class Recorded:
    """A step as two graphs that share their memory: what the first computes for both stays where it is."""

    def __init__(
        self,
        step: Callable[[], Any],
        standing_in: Callable[[Across], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._bottom, self._top = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        active = [self._bottom]

        def part(hidden_B1D: Tensor) -> Tensor:
            self._hidden_B1D = hidden_B1D
            self._bottom.capture_end()
            active[0] = self._top
            # Outside of both: it is written between them.
            self._state_B1D = torch.zeros_like(hidden_B1D)
            self._top.capture_begin(pool, capture_error_mode="thread_local")
            return self._state_B1D

        self._bottom.capture_begin(pool, capture_error_mode="thread_local")
        try:
            with standing_in(part):
                self._answer = step()
        finally:
            # Whatever happened: a stream that is left recording refuses all else.
            active[0].capture_end()

    def run(self, across: Across) -> Any:
        self._bottom.replay()
        self._state_B1D.copy_(across(self._hidden_B1D))
        self._top.replay()
        answer = self._answer
        return type(answer)(**{**answer, "logits": answer["logits"].clone()})
