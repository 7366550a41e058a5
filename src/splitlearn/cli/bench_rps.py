"""`splitlearn bench rps`: a load on a trunk, from kept activations; no bottom or top is computed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from splitlearn.cli.bench_report import AsJson, Counts, Output, Table, parse_counts, report_of, show, trunk_at
from splitlearn.cli.options import Model, default_of, parse_address, setting
from splitlearn.cli.sizes import parse_bytes
from splitlearn.config import GIB, DTypeName, ServerConfig, SessionConfig

TABLE = Table(
    {
        "sessions": "{sessions}",
        "steps/s": "{steps_per_s:.1f}",
        "p50 ms": "{latency[p50_ms]:.1f}",
        "p95 ms": "{latency[p95_ms]:.1f}",
        "p99 ms": "{latency[p99_ms]:.1f}",
        "failed": "{failed}",
        "a batch": "{steps_per_batch:.1f}",
        "generator": "{generator_use:.0%}",
    }
)
RunningTrunk = Annotated[
    str | None,
    typer.Option(
        parser=parse_address,
        metavar="HOST:PORT",
        help="A trunk server that runs; without it one is started here.",
    ),
]


def rps(
    model: Model,
    sessions: Annotated[
        Counts,
        typer.Option(
            parser=parse_counts, metavar="N,...", help="Sessions at once, one number after another."
        ),
    ] = "20",  # type: ignore[assignment]
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each is measured.")] = 10.0,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that send: more where one has no time left to wait.")
    ] = 1,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Prompts have so many tokens to twice as many.")
    ] = 16,
    text_tokens: Annotated[
        int, typer.Option(min=2, help="A session that holds so many is cropped back to its prompt.")
    ] = 256,
    trunk: RunningTrunk = None,
    dtype: Annotated[DTypeName, setting(ServerConfig, "dtype")] = "auto",
    kv_budget: Annotated[
        int, setting(SessionConfig, "kv_budget_bytes", "--kv-budget", parser=parse_bytes, metavar="BYTES")
    ] = f"{default_of(SessionConfig, 'kv_budget_bytes') // GIB}GiB",  # type: ignore[assignment]
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Steps a second that a trunk answers to many sessions at once, and how long each takes.

    --dtype and --kv-budget are for the server that is started here.
    """
    from splitlearn.bench.load import Load, put_load

    loads = [Load(count, seconds, processes, prompt_tokens, text_tokens) for count in sessions]
    own = ("--session-tokens", str(text_tokens), "--dtype", dtype, "--kv-budget", str(kv_budget))
    with trunk_at(trunk, model, *own) as address:
        rows = [put_load(address, load) for load in loads]
    settings: dict[str, Any] = {
        "seconds": seconds,
        "processes": processes,
        "prompt_tokens": prompt_tokens,
        "text_tokens": text_tokens,
        "trunk": trunk or "started here",
    }
    show(report_of("rps", model, settings, rows), TABLE, as_json=as_json, output=output)
