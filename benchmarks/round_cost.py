"""What does it cost that every round of a cohort is on the server's disk before its members are answered?

SmolLM2-135M in float32, a server of its own with one thread, LoRA on all linear layers of the trunk, rows of
random activations. A step (forward, backward, optimizer step) of a private run, which is in memory alone,
and of a cohort of one member, in turns: what a step of the second takes more is the round's.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from _common import markdown, median_ratio, serving, write
from _tenant import Tenant

from splitlearn.cli.demo_model import bundled_model
from splitlearn.vocabulary import CohortSettings, LoraSettings

RANKS, ROWS, TOKENS = (8, 16), (1, 4), 128
WARM_UP, STEPS = 3, 30


@dataclass(frozen=True, slots=True)
class Cost:
    """Medians: milliseconds of a step, bytes of the newest round on the disk."""

    rank: int
    rows: int
    private_ms: float
    cohort_ms: float
    ratio: float
    round_bytes: int

    @property
    def more_ms(self) -> float:
        return self.cohort_ms - self.private_ms


def measure(address: str, state: Path, rank: int, rows: int) -> Cost:
    lora = LoraSettings(r=rank, alpha=2.0 * rank, target_modules=("all-linear",))
    alone, member = Tenant(address), Tenant(address)
    name = f"round-{rank}-{rows}"
    private = alone.training(f"private-{rank}-{rows}", lora, rows, TOKENS)
    shared = member.training(name, lora, rows, TOKENS, CohortSettings("sync", members=1))
    for each in (private, shared):
        list(islice(each, WARM_UP))
    taken = [(timed(private), timed(shared)) for _ in range(STEPS)]
    for each in (alone, member):
        each.wire.close()
    ours, theirs = zip(*taken, strict=True)
    return Cost(
        rank,
        rows,
        statistics.median(ours) * 1e3,
        statistics.median(theirs) * 1e3,
        median_ratio(theirs, ours),
        newest_bytes(state, name),
    )


def timed(steps: Iterator[Any]) -> float:
    began = time.perf_counter()
    next(steps)
    return time.perf_counter() - began


def newest_bytes(state: Path, name: str) -> int:
    """Of the round's whole state: weights, the optimizer's, members."""
    return max(each.stat().st_size for each in state.rglob("*.safetensors") if name in str(each))


def main() -> None:
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as state,
        serving(bundled_model(), "--state-dir", state, "--kv-budget", "256MiB") as server,
    ):
        found = [measure(server.address, Path(state), rank, rows) for rank in RANKS for rows in ROWS]
    header = ("rank", f"rows of {TOKENS} tokens", "private step, ms", "cohort's step, ms",
              "cohort / private, median of pairs", "a round more, ms", "on the disk, MB")  # fmt: skip
    rows = [
        (
            each.rank,
            each.rows,
            f"{each.private_ms:.0f}",
            f"{each.cohort_ms:.0f}",
            f"{each.ratio:.2f}",
            f"{each.more_ms:.0f}",
            f"{each.round_bytes / 2**20:.1f}",
        )
        for each in found
    ]
    write("round_cost", [asdict(each) for each in found], markdown(header, rows))


if __name__ == "__main__":
    main()
