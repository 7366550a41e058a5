"""`splitlearn bench`: measurements, each a question with a verb of its own."""

from __future__ import annotations

from splitlearn.cli.bench_decode import decode
from splitlearn.cli.bench_plot import plot
from splitlearn.cli.bench_rps import rps

VERBS = {"rps": rps, "decode": decode, "plot": plot}


def bench() -> None:
    """Measure a trunk: steps a second under load, texts by several clients at once."""
