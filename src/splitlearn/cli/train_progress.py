"""What is shown while a training goes on: the library's progress bar, or a line for each log."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import ProgressCallback, TrainerCallback

Show = Callable[[str], None]


class Lines(TrainerCallback):
    """A line for each log."""

    def __init__(self, show: Show) -> None:
        self._show = show

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if line := line_of(state.global_step, state.max_steps, logs or {}):
            self._show(line)


class Bar(ProgressCallback):
    """The library's progress bar, with our lines above it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if line := line_of(state.global_step, state.max_steps, logs or {}):
            tqdm.write(line, file=sys.stderr)


def line_of(step: int, steps: int, logs: dict[str, float]) -> str:
    """Empty for a log that is no step's."""
    names = {
        "loss": "loss {:.4f}",
        "eval_loss": "held-out loss {:.4f}",
        "grad_norm": "gradient norm {:.3g}",
        "learning_rate": "learning rate {:.3g}",
    }
    told = [form.format(logs[name]) for name, form in names.items() if name in logs]
    return f"step {step} of {steps}: {', '.join(told)}" if told else ""


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
