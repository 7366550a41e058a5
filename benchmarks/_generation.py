"""Timed generation, split and whole, for the benchmarks that compare the two."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from splitlearn import AutoSplitModelForCausalLM
from splitlearn.cli.demo_model import bundled_model

NEW_TOKENS = 100


@dataclass(frozen=True, slots=True)
class Models:
    """The same weights twice: whole in this process, and with the trunk behind `split.trunk`."""

    whole: Any
    split: Any

    @classmethod
    def load(cls, folder: Path, address: str, **settings: Any) -> Models:
        torch.set_num_threads(1)
        split = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=address, **settings)
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=split.dtype).eval()
        return cls(whole, split)


def prompt(tokens: int, seed: int = 0) -> torch.Tensor:
    """(1, tokens) arbitrary ids: what the text says does not change what it costs."""
    return torch.randint(100, 40_000, (1, tokens), generator=torch.Generator().manual_seed(seed))


def tokens_per_s(
    model: Any, ids: torch.Tensor, new_tokens: int = NEW_TOKENS, **how: Any
) -> tuple[float, torch.Tensor]:
    """Greedy, exactly `new_tokens` of them, the prompt's time included; and the ids that came."""
    settings = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    started = time.perf_counter()
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **how)
    return new_tokens / (time.perf_counter() - started), made


def require_equal(split: torch.Tensor, whole: torch.Tensor) -> None:
    if not torch.equal(split, whole):
        raise SystemExit(
            "the split model's text differs from the whole model's: the figures would mean nothing"
        )


__all__ = ["NEW_TOKENS", "Models", "bundled_model", "prompt", "require_equal", "tokens_per_s"]
