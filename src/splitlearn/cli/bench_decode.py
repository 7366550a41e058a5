"""`splitlearn bench decode`: texts by several clients at once, beside the whole model's."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from splitlearn.cli.bench_report import AsJson, Counts, Output, Table, parse_counts, report_of, show, trunk_at
from splitlearn.cli.bench_rps import RunningTrunk
from splitlearn.cli.options import Codec, Model, setting
from splitlearn.config import DTypeName, ServerConfig

SPLIT = {
    "sessions": "{sessions}",
    "tokens/s": "{tokens_per_s:.1f}",
    "each": "{tokens_per_s_each:.1f}",
    "p50 ms": "{latency[p50_ms]:.1f}",
    "p99 ms": "{latency[p99_ms]:.1f}",
}
WHOLE = {
    "whole batch": "{whole_tokens_per_s:.1f}",
    "whole row": "{whole_alone_tokens_per_s:.1f}",
    "ratio": "{ratio:.2f}",
}


def decode(
    model: Model,
    sessions: Annotated[
        Counts,
        typer.Option(parser=parse_counts, metavar="N,...", help="Clients at once, one number after another."),
    ] = "1,2,4",  # type: ignore[assignment]
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that each client generates.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often; the median counts.")] = 1,
    whole: Annotated[
        bool, typer.Option("--whole/--no-whole", help="Run the whole model, too, if MODEL has all of it.")
    ] = True,
    trunk: RunningTrunk = None,
    dtype: Annotated[DTypeName, setting(ServerConfig, "dtype")] = "auto",
    codec: Codec = "raw",
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Tokens a second of several clients' `generate` at once, beside the whole model's.

    Each client is a process with one thread, and so is the whole model, which runs in turns with them.
    """
    from splitlearn.bench.texts import Texts, write_texts, writers
    from splitlearn.model.checkpoint import Checkpoint

    texts = Texts(sessions, prompt_tokens, new_tokens, rounds)
    whole = whole and Checkpoint.open(model).note is None
    with (
        trunk_at(trunk, model, "--dtype", dtype) as address,
        writers(model, address, max(sessions), dtype=dtype, codec=codec, whole=whole) as by,
    ):
        rows = list(write_texts(by, texts))
    settings: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "codec": codec,
        "trunk": trunk or "started here",
    }
    table = Table(SPLIT | WHOLE if whole else SPLIT)
    show(report_of("decode", model, settings, rows), table, as_json=as_json, output=output)
