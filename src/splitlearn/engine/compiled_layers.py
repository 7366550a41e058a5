"""The trunk's layers compiled for training, put in and taken out of their modules at no cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog
import torch
from torch import nn

from splitlearn.errors import first_line
from splitlearn.model.compiled_decode import keep_compiled_code

log = structlog.get_logger("splitlearn.engine")
SHAPES_KEPT = 64


class CompiledLayers:
    """Each layer is compiled by itself: layers of one kind share their code, and a trunk compiles in seconds.

    Weights are looked up at each call, so that versions of an adapter come and go without compiling again.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = list(layers)
        self._forwards: list[Callable[..., Any]] = []
        self._in_use = False
        self.failed = False

    def use(self, wanted: bool) -> None:
        """Let the layers run compiled from now on, or as they are."""
        wanted = wanted and not self.failed
        if wanted == self._in_use:
            return
        if wanted and not self._forwards:
            keep_compiled_code()
            torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, SHAPES_KEPT)
            self._forwards = [torch.compile(layer.forward) for layer in self._layers]
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            if wanted:
                vars(layer)["forward"] = forward
            else:
                del vars(layer)["forward"]
        self._in_use = wanted

    def give_up(self, error: Exception) -> bool:
        """Whether a failed step can be tried again without compiled code, which then is not used again."""
        if not self._in_use:
            return False
        log.warning("layers could not be compiled and run as they are", error=first_line(error))
        self.failed = True
        self.use(False)
        return True
