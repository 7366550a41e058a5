"""`splitlearn generate`: one text, streamed to stdout, its timings and bytes beside it."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitlearn.cli.options import (
    AcceptLabelLeak,
    Codec,
    MaxNewTokens,
    Model,
    OwnBottomLayers,
    OwnDevice,
    OwnDType,
    OwnTopLayers,
    Seed,
    Temperature,
    TopP,
    Trunk,
)
from splitlearn.cli.sizes import show_bytes

if TYPE_CHECKING:
    from splitlearn.cli.generation import Generated


def generate(
    model: Model,
    trunk: Trunk,
    prompt: Annotated[str, typer.Option(help="The text to go on from; `-` reads it from stdin.")],
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Seed = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Keep no KV cache on the trunk: send the whole text each step.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout in place of streamed text and table.")
    ] = False,
    bottom_layers: OwnBottomLayers = None,
    top_layers: OwnTopLayers = None,
    accept_label_leak: AcceptLabelLeak = False,
    dtype: OwnDType = "auto",
    codec: Codec = "raw",
    device: OwnDevice = "cpu",
) -> None:
    """Generate text: to stdout as it is made, timings and bytes to stderr."""
    from splitlearn.cli.generation import generate_text, sampling
    from splitlearn.cli.text import load_tokenizer, prompt_inputs
    from splitlearn.client.split_model import AutoSplitModelForCausalLM

    how = sampling(temperature, top_p, seed)
    tokenizer = load_tokenizer(model)
    inputs = prompt_inputs(tokenizer, read_prompt(prompt), chat=chat)
    client = AutoSplitModelForCausalLM.from_pretrained(
        model,
        trunk=trunk,
        bottom_layers=bottom_layers,
        top_layers=top_layers,
        accept_label_leak=accept_label_leak,
        dtype=dtype,
        device=device,
        codec=codec,
    )
    with closing(client):
        made = generate_text(
            client,
            tokenizer,
            inputs,
            show=None if as_json else sys.stdout,
            max_new_tokens=max_new_tokens,
            use_cache=not no_cache,
            **how,
        )
    if as_json:
        print(json.dumps(figures(made)))
    else:
        _print_table(made)


def read_prompt(prompt: str) -> str:
    return sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt


def figures(made: Generated) -> dict[str, Any]:
    """The text and all that was measured; bytes per token count the prompt's share in."""
    tokens, crossed = len(made.token_ids), made.crossed
    return {
        "text": made.text,
        "tokens": tokens,
        "token_ids": made.token_ids,
        "prompt_tokens": made.prompt_tokens,
        "time_to_first_token_s": made.pace.time_to_first_token_s,
        "tokens_per_s": made.pace.tokens_per_s,
        "tensor_bytes": crossed.tensor_bytes,
        "sent_bytes": crossed.sent_bytes,
        "received_bytes": crossed.received_bytes,
        "tensor_bytes_per_token": crossed.tensor_bytes / tokens,
        "sent_bytes_per_token": crossed.sent_bytes / tokens,
        "received_bytes_per_token": crossed.received_bytes / tokens,
        "messages": crossed.messages,
    }


def _print_table(made: Generated) -> None:
    from rich.console import Console
    from rich.table import Table

    crossed, tokens = made.crossed, len(made.token_ids)
    table = Table("tokens", "first token", "after it", "sent", "received", "a new token", box=None)
    table.add_row(
        f"{made.prompt_tokens} + {tokens}",
        f"{made.pace.time_to_first_token_s:.2f} s",
        f"{made.pace.tokens_per_s:.1f} a second",
        show_bytes(crossed.sent_bytes),
        show_bytes(crossed.received_bytes),
        show_bytes((crossed.sent_bytes + crossed.received_bytes) / tokens),
    )
    Console(stderr=True, highlight=False).print(table)
