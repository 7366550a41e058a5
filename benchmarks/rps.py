"""How many steps a second does a trunk answer to many clients, and how long does each wait?

Sessions of one row replay activations, a token at a time, each over a connection of its own, from one
process; the server is another, with one thread. The tiny model's steps cost next to nothing to compute, so
they show what serving costs. SmolLM2-135M is in the checkpoint's dtype, texts of 16 to 256 tokens.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

from _common import markdown, serving, write

from splitlearn.bench.load import Load, LoadFigures, put_load
from splitlearn.bench.machine import circumstances
from splitlearn.cli.demo_model import bundled_model
from splitlearn.testing.tiny import tiny_model

SECONDS = 15.0
TEXT_TOKENS = 256
SESSIONS = {"tiny": (1, 8, 20, 50), "SmolLM2-135M": (1, 4, 20)}
WANTED = {("tiny", 20): 1000, ("SmolLM2-135M", 20): 100}


def loads(name: str, folder: Path) -> list[LoadFigures]:
    with serving(folder, "--session-tokens", str(TEXT_TOKENS)) as server:
        return [
            put_load(server.address, Load(count, SECONDS, text_tokens=TEXT_TOKENS))
            for count in SESSIONS[name]
        ]


def cells(name: str, figures: LoadFigures) -> tuple[object, ...]:
    latency = figures.latency
    return (
        name,
        figures.sessions,
        f"{figures.steps_per_s:.0f}",
        WANTED.get((name, figures.sessions), ""),
        f"{latency.p50_ms:.1f} / {latency.p95_ms:.1f} / {latency.p99_ms:.1f}",
        figures.failed,
        f"{figures.steps_per_batch:.1f}",
        f"{figures.generator_use:.0%}",
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        folders = {"tiny": tiny_model("llama", folder), "SmolLM2-135M": bundled_model()}
        figures = {name: loads(name, path) for name, path in folders.items()}
    header = (
        "model",
        "sessions",
        "steps/s",
        "wanted",
        "p50 / p95 / p99, ms",
        "failed",
        "steps a batch",
        "processor of the load",
    )
    rows = [cells(name, each) for name, those in figures.items() for each in those]
    found = {name: [asdict(each) for each in those] for name, those in figures.items()}
    busy = circumstances()["busy"]
    table = f"{markdown(header, rows)}\n\nProcesses that wanted a processor in the last minute: {busy}."
    write("rps", found | {"busy": busy}, table)


if __name__ == "__main__":
    main()
