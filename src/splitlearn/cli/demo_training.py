"""The demo's second half: the same model learns a house's way of answering, over the same wire."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from splitlearn.cli.sizes import show_bytes
from splitlearn.cli.train_settings import TrainSettings

TEXT = Path(__file__).with_name("demo_text.jsonl")
PROMPT = "What does the house say about umbrellas?\n"
NEW_TOKENS = 64
STEPS = 16

BEGIN = (
    "\nNow it learns, about a minute on one free core. {file} has {examples} questions to a house, answered; "
    "{held_out} of them are held out. In {steps} steps of LoRA on all {layers} layers, the bottom's "
    "and top's weights change here and the trunk's there. Questions, answers and the loss stay here.\n"
)


def show_training(folder: Path, address: str, console: Console) -> None:
    """Fine-tune over the wire; print the loss of each few steps, and a text before and after."""
    from splitlearn.cli.fine_tuning import FineTuning, learnable
    from splitlearn.cli.text import load_tokenizer
    from splitlearn.cli.train_arguments import lora_of
    from splitlearn.client.split_model import AutoSplitModelForCausalLM

    with tempfile.TemporaryDirectory() as output:
        settings = settings_for(Path(output))
        data = learnable(str(folder), settings)
        client = AutoSplitModelForCausalLM.from_pretrained(
            folder, trunk=address, lora=lora_of(settings), seed=settings.seed
        )
        with closing(client):
            console.print(
                BEGIN.format(
                    examples=data.train_examples + data.held_out_examples,
                    file=TEXT.name,
                    held_out=data.held_out_examples,
                    steps=STEPS,
                    layers=client.config.num_hidden_layers,
                )
            )
            tokenizer = load_tokenizer(str(folder))
            tuning = FineTuning(client, data, settings, show=console.print, has_bar=False)
            text_before = answer(client, tokenizer)
            sent, started = client.trunk.transport.traffic.tensor_bytes, time.perf_counter()
            done = tuning.run()
            seconds = time.perf_counter() - started
            sent = client.trunk.transport.traffic.tensor_bytes - sent
            text_after = answer(client, tokenizer)
    table = Table(
        "", "before", f"after {done.steps} steps", title=f"asked: {PROMPT.strip()}", show_lines=True
    )
    table.add_row("held-out loss", f"{done.held_out_loss_before:.2f}", f"{done.held_out_loss_after:.2f}")
    table.add_row("text", Text(text_before), Text(text_after))
    console.print(table)
    console.print(f"It took {seconds:.0f} s and sent {show_bytes(sent)} of activations and gradients.")


def settings_for(output: Path) -> TrainSettings:
    """A few short steps on a few long rows, because this is a demo."""
    return TrainSettings(
        data=[TEXT],
        output=output,
        max_tokens=256,
        held_out=0.14,
        max_steps=STEPS,
        batch_size=1,
        accumulation=1,
        learning_rate=2e-3,
        precision="float32",
        log_steps=4,
        save_steps=STEPS,
        tensorboard=False,
    )


def answer(client: Any, tokenizer: Any) -> str:
    """What the model, with its adapter as it is now, says to a question that is not in the file."""
    from splitlearn.cli.generation import generate_text
    from splitlearn.cli.text import prompt_inputs

    client.eval()
    inputs = prompt_inputs(tokenizer, PROMPT)
    made = generate_text(client, tokenizer, inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return made.text.strip()
