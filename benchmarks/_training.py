"""A hand-written LoRA step, split and whole, for the benchmarks that compare the two."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from splitlearn import AutoSplitModelForCausalLM
from splitlearn.client.training import clip_grad_norm, plan_run
from splitlearn.model.lora import ADAPTER, add_lora, settings_of, weights_of
from splitlearn.vocabulary import OptimizerSettings

SEED = 0
LEARNING_RATE = 1e-3


def lora(r: int = 8, targets: Any = "all-linear") -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules=targets)


@dataclass(frozen=True, slots=True)
class Trained:
    """A model with an adapter, its optimizer, and one step of it."""

    model: Any
    optimizer: torch.optim.Optimizer

    @classmethod
    def whole(cls, folder: Path, config: LoraConfig, **how: Any) -> Trained:
        model = AutoModelForCausalLM.from_pretrained(folder, **how)
        add_lora(model, settings_of(config, model.config.model_type), ADAPTER, SEED)
        return cls(model.train(), _optimizer(model))

    @classmethod
    def split(cls, folder: Path, address: str, config: LoraConfig, **how: Any) -> Trained:
        model = AutoSplitModelForCausalLM.from_pretrained(
            folder, trunk=address, lora=config, seed=SEED, **how
        )
        plan_run(model.trunk, OptimizerSettings(learning_rate=LEARNING_RATE))
        return cls(model.train(), _optimizer(model))

    def step(self, ids: torch.Tensor, max_norm: float = 1.0) -> tuple[float, float]:
        """The loss, and the seconds that forward, backward, clipping and the optimizers took."""
        started = time.perf_counter()
        loss = self.model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        is_split = hasattr(self.model, "trunk")
        if is_split:
            clip_grad_norm(self.model, max_norm)
            self.model.trunk.step()
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = loss.item()
        return value, time.perf_counter() - started


def _optimizer(model: Any) -> torch.optim.Optimizer:
    weights = list(weights_of(model, ADAPTER).values())
    return torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def batch(rows: int, tokens: int, vocabulary: int = 40_000, seed: int = 0) -> torch.Tensor:
    return torch.randint(100, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))
