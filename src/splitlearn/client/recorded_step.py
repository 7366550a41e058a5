"""A decode step of the client as two CUDA graphs, around the call to the trunk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from splitlearn.wire.host_memory import host_like

# B rows   T 1   D hidden

Across = Callable[[Tensor], Tensor]
"""(B, 1, D) at the lower cut -> (B, 1, D) at the upper cut."""


class OnTheHost:
    """What leaves the device with the activation at the lower cut, and comes with the one at the upper cut.

    Args:
        hidden_B1D: what the activations look like.
        positions_B1: where the new tokens stand.
        visible_BK: the columns that count.
    """

    def __init__(self, hidden_B1D: Tensor, positions_B1: Tensor, visible_BK: Tensor) -> None:
        self._asked = positions_B1, visible_BK
        self.hidden_B1D, self.state_B1D = host_like(hidden_B1D), host_like(hidden_B1D)
        self.positions_B1 = host_like(positions_B1)
        self.is_unpadded = host_like(visible_BK.all())

    def fetch(self, hidden_B1D: Tensor) -> None:
        """In one go: a value looked at by itself costs a wait for the device each."""
        positions_B1, visible_BK = self._asked
        self.hidden_B1D.copy_(hidden_B1D, non_blocking=True)
        self.positions_B1.copy_(positions_B1, non_blocking=True)
        self.is_unpadded.copy_(visible_BK.all(), non_blocking=True)


class Recorded:
    """A step as two graphs that share their memory: what the first computes for both stays where it is.

    Copies between host and device are parts of them.
    """

    def __init__(
        self,
        step: Callable[[], Any],
        standing_in: Callable[[Across], contextlib.AbstractContextManager[None]],
        host: OnTheHost,
    ) -> None:
        self.host = host
        self._bottom, self._top = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        active = [self._bottom]

        def part(hidden_B1D: Tensor) -> Tensor:
            host.fetch(hidden_B1D)
            self._bottom.capture_end()
            active[0] = self._top
            self._top.capture_begin(pool, capture_error_mode="thread_local")
            state_B1D = torch.empty_like(hidden_B1D)
            return state_B1D.copy_(host.state_B1D, non_blocking=True)

        self._bottom.capture_begin(pool, capture_error_mode="thread_local")
        try:
            with standing_in(part):
                self._answer = step()
        finally:
            # Whatever happened: a stream that is left recording refuses all else.
            active[0].capture_end()

    def run(self, across: Across) -> Any:
        """`across` gives what is on the host, and is given it: the next step's is written in its place."""
        self._bottom.replay()
        torch.cuda.current_stream().synchronize()
        self.host.state_B1D.copy_(across(self.host.hidden_B1D))
        self._top.replay()
        answer = self._answer
        return type(answer)(**{**answer, "logits": answer["logits"].clone()})
