"""Does the split model learn from a user's file what the whole model learns from it?

SmolLM2-135M in float32 and the demo's file, of which a share is held out: its loss before and after two
epochs, the mean over the tokens that bear one. LoRA r=8 on all linear layers from one initial adapter, packed
rows of 256 tokens in one order, clipping, cosine schedule; SplitTrainer over a real socket beside
transformers' Trainer with PEFT's weights on the whole model.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import markdown, serving, write
from _generation import bundled_model
from _training import SEED, lora
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from splitlearn import AutoSplitModelForCausalLM, SplitTrainer, held_out_loss
from splitlearn.cli import demo
from splitlearn.model.lora import ADAPTER, add_lora, settings_of
from splitlearn.training.data import TrainingData, training_data

TEXT = Path(demo.__file__).with_name("demo_text.jsonl")
MAX_TOKENS, HELD_OUT, EPOCHS = 256, 0.14, 2
WANTED_FALL, CLOSE = 0.3, 0.01


def arguments(output: str) -> TrainingArguments:
    return TrainingArguments(
        output,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=1,
        max_grad_norm=1.0,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=SEED,
    )


def held_out(data: TrainingData) -> DataLoader:
    return DataLoader(data.held_out, collate_fn=data.collate)


def learn(kind: type[Trainer], model: Any, data: TrainingData) -> dict[str, Any]:
    """The trainer comes first: it says with which optimizer the trunk's run is opened."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        trainer = kind(
            model=model, args=arguments(output), train_dataset=data.train, data_collator=data.collate
        )
        before = held_out_loss(model, held_out(data))
        trainer.train()
        after = held_out_loss(model, held_out(data))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures = {"before": before, "after": after, "fall": before - after, "losses": losses}
    figures["seconds"] = time.perf_counter() - started
    print(kind.__name__, {name: figures[name] for name in ("before", "after", "seconds")}, flush=True)
    return figures


def learn_whole(folder: Path, data: TrainingData) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    add_lora(model, settings_of(lora(), model.config.model_type), ADAPTER, SEED)
    return learn(Trainer, model, data)


def learn_split(folder: Path, address: str, data: TrainingData) -> dict[str, Any]:
    model = AutoSplitModelForCausalLM.from_pretrained(
        folder, trunk=address, lora=lora(), seed=SEED, dtype=torch.float32
    )
    figures = learn(SplitTrainer, model, data)
    model.close()
    return figures


def main() -> None:
    torch.set_num_threads(1)
    folder = bundled_model()
    data = training_data(
        TEXT,
        AutoTokenizer.from_pretrained(folder),
        max_tokens=MAX_TOKENS,
        held_out_share=HELD_OUT,
        seed=SEED,
        pack_for=AutoConfig.from_pretrained(folder),
    )
    with serving(folder) as server:
        split = learn_split(folder, server.address, data)
    whole = learn_whole(folder, data)
    apart = abs(split["fall"] - whole["fall"]) / whole["fall"]
    rows = [
        (name, f"{f['before']:.4f}", f"{f['after']:.4f}", f"{f['fall']:.4f}")
        for name, f in (("whole", whole), ("split", split))
    ]
    rows.append((f"apart, of the fall (wanted <= {CLOSE:.0%})", "", "", f"{apart:.2e}"))
    header = (
        f"{data.train_examples} examples in {len(data.train)} rows, {EPOCHS} epochs; "
        f"{data.held_out_examples} held out",
        "held-out loss before, nats",
        "after",
        f"fall (wanted >= {WANTED_FALL})",
    )
    write("learns", {"whole": whole, "split": split, "apart": apart}, markdown(header, rows))
    if min(split["fall"], whole["fall"]) < WANTED_FALL or apart > CLOSE:
        sys.exit("wanted is more than that")


if __name__ == "__main__":
    main()
