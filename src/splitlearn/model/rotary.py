"""Rotary tables that their module recomputes in its forward: one thread at a time may do so."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

from splitlearn.model.skeleton import around_the_layers, is_rotary

RECOMPUTED = ("longrope", "dynamic")


def guard_recomputed_rotary(causal_lm: nn.Module) -> None:
    """Let threads that generate with one model not rotate by each other's frequencies.

    Such a module writes the frequencies for the text at hand into its own buffer and reads them
    back, so a short and a long text in two threads could get each other's.
    """
    for _, _, module in around_the_layers(causal_lm):
        if is_rotary(module) and _recomputes(module):
            _run_alone(module)


def _recomputes(rotary: nn.Module) -> bool:
    told = getattr(rotary, "rope_type", "default")
    types = told.values() if isinstance(told, dict) else [told]
    return any(each in RECOMPUTED for each in types)


def _run_alone(module: nn.Module) -> None:
    lock, forward = threading.Lock(), module.forward

    def forward_alone(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return forward(*args, **kwargs)

    module.forward = forward_alone
