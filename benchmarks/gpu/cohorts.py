"""Cohorts and tenants on a GPU: exactness, memory of eight tenants, waiting beside one, what a round costs.

Run on a machine with one CUDA GPU: `python benchmarks/gpu/cohorts.py` (`--cpu` tries the script with tiny
shapes). Random weights:

exact        a synchronous cohort against the whole model with the union batch, float32, a 135M shape
memory       the device's memory before any tenant, with one, and with eight: a 1B shape, bfloat16, rank 64
rounds       a step of a private run against a cohort's, whose every round goes to the disk, a 1B shape
waiting      a text's steps alone and beside a tenant that fills its quota, a 1B shape
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from frame import TINY, Bench, arguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cohort_parity
import round_cost
import tenants
from _common import Server, serving
from _tenant import Tenant
from training import SHAPE as BILLION

SECTIONS = ("exact", "memory", "rounds", "waiting")
SMALL = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
CLIENTS, ROUNDS, MB = (2, 5), 3, 1 << 20


@contextmanager
def model(bench: Bench, shape: dict[str, object], dtype: torch.dtype) -> Iterator[Path]:
    bench.shape = TINY if bench.is_tiny else shape
    bench.dtype = torch.float32 if bench.is_tiny else dtype
    with bench.model() as folder:
        yield Path(folder)


def where(bench: Bench) -> tuple[str, ...]:
    return ("--device", bench.device, "--dtype", str(bench.dtype).removeprefix("torch."))


@contextmanager
def server_of(bench: Bench, folder: Path) -> Iterator[tuple[Server, Path]]:
    """With the folder that its state lies in."""
    with (
        tempfile.TemporaryDirectory() as state,
        serving(folder, "--state-dir", state, *where(bench)) as server,
    ):
        yield server, Path(state)


def exact(bench: Bench) -> None:
    with model(bench, SMALL, torch.float32) as folder, server_of(bench, folder) as (server, _):
        at = cohort_parity.Place(folder, server.address, bench.device, tokens=bench.shape["vocab_size"])
        for count in CLIENTS:
            found = cohort_parity.measure(at, count)
            bench.note(
                f"{count} members against the union batch",
                gradient=found.gradient,
                update=found.update,
                equal_weights=found.update_of_equal_weights,
            )


def memory(bench: Bench) -> None:
    """In multiples of (adapter + optimizer): float32 weights, and two moments of each."""
    with model(bench, BILLION, torch.bfloat16) as folder, server_of(bench, folder) as (server, _):
        held, there = [used(bench)], []
        for number in range(tenants.TENANTS):
            there.append(Tenant(server.address))
            training = there[-1].training(f"run{number}", tenants.LORA, tenants.ROWS, tenants.TOKENS)
            list(islice(training, tenants.STEPS))
            held.append(used(bench))
        weights = there[0].wire.download_adapter("run0").weights.values()
        each = 3 * sum(weight.numel() * 4 for weight in weights)
        for tenant in there:
            tenant.wire.close()
    bench.note(
        "memory of eight tenants",
        none_mb=held[0] // MB,
        one_mb=held[1] // MB,
        eight_mb=held[-1] // MB,
        adapter_and_optimizer_mb=each // MB,
        eight_over_one=(held[-1] - held[1]) / tenants.TENANTS / each,
        each_further=(held[-1] - held[1]) / (tenants.TENANTS - 1) / each,
    )


def used(bench: Bench) -> int:
    """Bytes of the device that are taken, the allocator's reserve included."""
    if bench.device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def rounds(bench: Bench) -> None:
    with model(bench, BILLION, torch.bfloat16) as folder, server_of(bench, folder) as (server, state):
        for rank in round_cost.RANKS:
            found = round_cost.measure(server.address, state, rank, rows=4)
            bench.note(
                f"a round, rank {rank}, 4 x {round_cost.TOKENS} tokens",
                private_ms=found.private_ms,
                cohort_ms=found.cohort_ms,
                ratio=found.ratio,
                round_mb=found.round_bytes / MB,
            )


def waiting(bench: Bench) -> None:
    tenants.SECONDS, tenants.ROUNDS, tenants.SETTLE_S = (1.0, 1, 0.5) if bench.is_tiny else (8.0, ROUNDS, 2.0)
    # The text has the same quota, and shall not wait for it.
    tenants.QUOTAS = {"400 tokens/s": ("--quota-tokens", "400"), "none": ()}
    with model(bench, BILLION, torch.bfloat16) as folder, tempfile.TemporaryDirectory() as state:
        tenants.FLAGS = (*tenants.FLAGS, *where(bench))
        for name, pairs in tenants.waiting(folder, state).items():
            bench.note(
                f"beside a tenant with quota {name}",
                p99_alone_ms=pairs[0][0].p99_ms,
                p50_beside_over_alone=tenants.slower(pairs, "p50_ms"),
                p99_beside_over_alone=tenants.slower(pairs),
            )


def main() -> None:
    asked = arguments(__doc__ or "", SECTIONS, ()).parse_args()
    bench = Bench(asked)
    for section in asked.only:
        try:
            globals()[section](bench)
        except (Exception, SystemExit) as error:
            bench.note_failure(section, error)
        bench.free()
    bench.table()


if __name__ == "__main__":
    main()
