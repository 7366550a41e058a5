"""`splitlearn plan`: layers, memory and bytes of a split, before anything runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from splitlearn.cli.options import (
    BOTTOM_LAYERS,
    SESSION_TOKENS,
    TOP_LAYERS,
    AcceptLabelLeak,
    BottomLayers,
    Model,
    TopLayers,
    setting,
)
from splitlearn.cli.sizes import show_bytes
from splitlearn.config import ClientConfig, CodecName, DTypeName, ServerConfig, SessionConfig

if TYPE_CHECKING:
    from splitlearn.cli.cost import SplitCost, Work


def plan(
    model: Model,
    batch: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 1,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, or of a training row.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after the prompt.")] = 100,
    bottom_layers: BottomLayers = BOTTOM_LAYERS,
    top_layers: TopLayers = TOP_LAYERS,
    accept_label_leak: AcceptLabelLeak = False,
    dtype: Annotated[DTypeName, setting(ServerConfig, "dtype")] = "auto",
    codec: Annotated[CodecName, setting(ClientConfig, "codec")] = "raw",
    session_tokens: Annotated[int, setting(SessionConfig, "session_tokens", min=1)] = SESSION_TOKENS,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of the table.")] = False,
) -> None:
    """Layers, memory and bytes of a split, before anything runs.

    Opens the configuration and the tensors' headers only; of a hub id the files are fetched first.
    """
    from splitlearn.cli.cost import Work, split_cost
    from splitlearn.model.checkpoint import Checkpoint
    from splitlearn.model.plan import SplitPlan

    checkpoint = Checkpoint.open(model)
    split = SplitPlan.for_config(checkpoint.config, bottom_layers, top_layers, accept_label_leak)
    work = Work(batch, seq, new_tokens)
    cost = split_cost(checkpoint, split, work, session_tokens, dtype, codec)
    if as_json:
        print(json.dumps({"model": model} | asdict(work) | asdict(cost)))
    else:
        _print_tables(model, cost, work)


def _print_tables(model: str, cost: SplitCost, work: Work) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    sides = Table("", "layers", "parameters", f"weights ({cost.dtype})", title=f"{model}, split {cost.split}")
    for name, side in (("client (bottom and top)", cost.client), ("trunk", cost.trunk)):
        sides.add_row(name, str(side.layers), f"{side.parameters:,}", show_bytes(side.weight_bytes))
    console.print(sides)
    figures = Table("", "bytes", show_header=False)
    for name, value in _rows(cost, work):
        figures.add_row(name, value)
    console.print(figures)


def _rows(cost: SplitCost, work: Work) -> list[tuple[str, str]]:
    kv, wire = cost.kv, cost.wire
    text = f"{work.batch} x ({work.seq} + {work.new_tokens}) tokens"
    return [
        ("trunk: KV cache of a token", show_bytes(kv.bytes_per_token)),
        (
            f"trunk: KV cache of a session of {work.batch} x {kv.session_tokens:,} tokens",
            show_bytes(kv.bytes_per_session),
        ),
        ("trunk: sessions in one batch", "yes" if cost.batched else f"one by one ({cost.batched_reason})"),
        (f"wire ({cost.wire_dtype}): a token of one row", show_bytes(wire.bytes_per_token)),
        (f"wire: prefill of {work.batch} x {work.seq} tokens", show_bytes(wire.prefill_bytes)),
        (f"wire: a decode step of {work.batch} rows", show_bytes(wire.decode_step_bytes)),
        (f"wire: all of {text}", show_bytes(wire.generation_bytes)),
        ("wire: the same text without the cache", show_bytes(wire.generation_bytes_without_cache)),
        (
            f"wire: a training step of {work.batch} x {work.seq} tokens",
            show_bytes(wire.training_step_bytes),
        ),
    ]
