"""Do 20 split steps change the adapter as 20 steps of PEFT and Trainer on the whole model do?

SmolLM2-135M, LoRA r=8 on all linear layers from one initial adapter, batch 2 x 64, accumulation 2, clipping
at 1.0, cosine schedule, weight decay 0.01, dropout 0, over a real socket, float32. Compared: every logged
loss, and the update of all LoRA weights (after minus before) in relative norm. The control clips the trunk by
its own norm alone: it must fail. Half precision is compared by benchmarks/gpu/training.py: a CPU without
instructions for it takes hours.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import markdown, serving, write
from _generation import bundled_model
from _training import batch, lora
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from splitlearn import AutoSplitModelForCausalLM, SplitTrainer
from splitlearn.client.training import clip_grad_norm
from splitlearn.model.lora import ADAPTER, add_lora, settings_of, weights_of

STEPS, ROWS, TOKENS, ACCUMULATION, SEED = 20, 2, 64, 2, 0
Weights = dict[str, torch.Tensor]
CLOSE_LOSS, CLOSE_UPDATE = 1e-5, 1e-3


def arguments(**how: Any) -> TrainingArguments:
    return TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=1.0,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=SEED,
        **how,
    )


class TrunkClippedByItself(SplitTrainer):
    """The control: each side clips by its own norm."""

    def _clip(self, model: Any, max_norm: float) -> torch.Tensor:
        norms = self._trunk.grad_norms()
        total = torch.linalg.vector_norm(norms[norms >= 0])
        clipped = clip_grad_norm(model, max_norm)
        self._trunk.gradient_scale = min(1.0, max_norm / (float(total) + 1e-6))
        return clipped


def train(kind: type[Trainer], model: Any, ids: torch.Tensor, **how: Any) -> list[float]:
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = kind(model=model, args=arguments(**how), train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run_whole(folder: Path, ids: torch.Tensor, **how: Any) -> tuple[list[float], Weights, Weights]:
    """The losses, and the adapter before and after; the split model draws the same one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    add_lora(model, settings_of(lora(), model.config.model_type), ADAPTER, SEED)
    before = copies(weights_of(model, ADAPTER))
    losses = train(Trainer, model, ids, **how)
    return losses, before, copies(weights_of(model, ADAPTER))


def run_split(
    folder: Path, address: str, ids: torch.Tensor, kind: type[Trainer] = SplitTrainer, **how: Any
) -> tuple[list[float], Weights]:
    model = AutoSplitModelForCausalLM.from_pretrained(
        folder, trunk=address, lora=lora(), seed=SEED, dtype=torch.float32
    )
    losses = train(kind, model, ids, **how)
    after = model.adapter_weights()
    model.close()
    return losses, after


def copies(weights: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def changes(before: dict[str, torch.Tensor], after: Any) -> dict[str, torch.Tensor]:
    return {name: after[name].detach() - weight for name, weight in before.items()}


def loss_distance(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


def update_distance(ours: dict[str, torch.Tensor], theirs: Weights) -> float:
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    return float((apart / sum(float(update.double().square().sum()) for update in theirs.values())) ** 0.5)


def main() -> None:
    torch.set_num_threads(1)
    folder = bundled_model()
    ids = batch(STEPS * ROWS * ACCUMULATION, TOKENS)
    rows, figures = [], {}
    with serving(folder) as server:
        whole_losses, before, whole = run_whole(folder, ids)
        for what, kind in (
            ("split", SplitTrainer),
            ("control: trunk clipped by itself", TrunkClippedByItself),
        ):
            losses, split = run_split(folder, server.address, ids, kind)
            updates = changes(before, split), changes(before, whole)
            apart = loss_distance(losses, whole_losses), update_distance(*updates)
            figures[what] = {"loss": apart[0], "update": apart[1], "losses": losses}
            rows.append((what, f"{apart[0]:.1e}", f"{apart[1]:.1e}"))
            print(rows[-1], flush=True)
    header = (
        f"{STEPS} steps against PEFT and Trainer on the whole model",
        f"losses, relative (wanted <= {CLOSE_LOSS:.0e})",
        f"adapter's update, relative norm (wanted <= {CLOSE_UPDATE:.0e})",
    )
    write("training_parity", figures, markdown(header, rows))


if __name__ == "__main__":
    main()
