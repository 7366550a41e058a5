"""What do eight tenants on one base take, and what does one that fills its quota cost the others?

SmolLM2-135M in float32, each server a process of its own with one thread; tenants compute nothing and send
random activations. Memory: each tenant trains a LoRA of rank 64 on all linear layers, the server's resident
memory is read after each. Waiting: one tenant writes a text, alone and beside a neighbour (a process of its
own) that writes, sends prompts and trains as fast as it is let, in turns; on servers with quotas and without.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _common import markdown, serving, write
from _tenant import Neighbour, Tenant, step_times

from splitlearn.bench.latencies import Latencies
from splitlearn.cli.demo_model import bundled_model
from splitlearn.vocabulary import LoraSettings

MB = 1 << 20
TENANTS, STEPS, ROWS, TOKENS = 8, 3, 1, 64
LORA = LoraSettings(r=64, alpha=128.0, target_modules=("all-linear",))
SMALL = LoraSettings(r=8, alpha=16.0, target_modules=("all-linear",))
WANTED_MEMORY, WANTED_SLOWER = 1.10, 1.20
PROMPT, TEXT, NEIGHBOURS_PROMPT = 16, 256, 256
WITH = "25 tokens/s, 0.005 of the turns"
QUOTAS = {
    WITH: ("--quota-tokens", "25", "--quota-turns", "0.005"),
    "25 tokens/s": ("--quota-tokens", "25"),
    "none": (),
}
SETTLE_S, SECONDS, ROUNDS = 3.0, 25.0, 5
FLAGS = ("--session-tokens", "512", "--kv-budget", "256MiB")


# ---------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: resident before any tenant and with each further one; of one's adapter and optimizer."""

    base: int
    tenants: list[int]
    adapter: int
    optimizer: int

    @property
    def further(self) -> float:
        """What each tenant after the first takes, in (adapter + optimizer)."""
        return (self.tenants[-1] - self.tenants[0]) / (TENANTS - 1) / (self.adapter + self.optimizer)

    @property
    def over_one(self) -> float:
        """All tenants' memory over one tenant's, in 8 (adapter + optimizer)."""
        return (self.tenants[-1] - self.tenants[0]) / TENANTS / (self.adapter + self.optimizer)

    @property
    def over_none(self) -> float:
        return (self.tenants[-1] - self.base) / TENANTS / (self.adapter + self.optimizer)


def memory(folder: Path, state: str) -> Memory:
    with serving(folder, *FLAGS, "--state-dir", state) as server:
        # What the first training of any tenant takes once is the libraries'.
        first = Tenant(server.address)
        train(first.training("first", LoraSettings(r=1, target_modules=("all-linear",)), ROWS, TOKENS))
        first.wire.close_run("first")
        base, held = resident(server.pid), []
        tenants = [Tenant(server.address) for _ in range(TENANTS)]
        for number, tenant in enumerate(tenants):
            train(tenant.training(f"run{number}", LORA, ROWS, TOKENS))
            held.append(resident(server.pid))
        weights = tenants[0].wire.download_adapter("run0").weights.values()
        adapter = sum(weight.nbytes for weight in weights)
        for each in (first, *tenants):
            each.wire.close()
    return Memory(base, held, adapter, optimizer=2 * adapter)


def train(steps: Iterator[Any]) -> None:
    for _ in itertools.islice(steps, STEPS):
        pass


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- waiting


@dataclass(frozen=True, slots=True)
class Waited:
    """One window of the text: its steps, and within how many ms half, 99 of a hundred and all were done."""

    steps: int
    p50_ms: float
    p99_ms: float
    most_ms: float

    @classmethod
    def of(cls, seconds: list[float]) -> Waited:
        found = Latencies.of(seconds).percentiles()
        return cls(len(seconds), found.p50_ms, found.p99_ms, max(seconds) * 1e3)


@contextlib.contextmanager
def neighbour(address: str) -> Iterator[Callable[[str], Any]]:
    """In a process of its own, which does what it is told: it must not hold up the text's."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=be_a_neighbour, args=(address, theirs))
    process.start()

    def tell(what: str) -> Any:
        ours.send(what)
        return ours.recv()

    try:
        tell("rest")
        yield tell
    finally:
        tell("end")
        process.join()


def be_a_neighbour(address: str, commands: Any) -> None:
    torch.set_num_threads(1)
    does = Neighbour(
        address,
        [
            lambda tenant: tenant.text(PROMPT, TEXT),
            lambda tenant: tenant.prompts(NEIGHBOURS_PROMPT),
            lambda tenant: tenant.training(f"run{os.getpid()}", SMALL, ROWS, TOKENS),
        ],
    )
    told = ""
    while told != "end":
        told = commands.recv()
        getattr(does, told)()
        commands.send(does.rounds)


def windows(tell: Callable[[str], Any], text: Iterator[None]) -> tuple[Waited, Waited]:
    """The text alone, then beside the neighbour."""
    step_times(text, SETTLE_S)
    alone = Waited.of(step_times(text, SECONDS))
    tell("go_on")
    step_times(text, SETTLE_S)
    beside = Waited.of(step_times(text, SECONDS))
    # Its answers come at once when the text stands still.
    print("text, prompts and steps of the neighbour so far:", tell("rest"), flush=True)
    return alone, beside


def waiting(folder: Path, state: str) -> dict[str, list[tuple[Waited, Waited]]]:
    found: dict[str, list[tuple[Waited, Waited]]] = {name: [] for name in QUOTAS}
    with contextlib.ExitStack() as open:
        ready = {}
        for name, quota in QUOTAS.items():
            server = open.enter_context(serving(folder, *FLAGS, "--state-dir", state, *quota))
            tenant = Tenant(server.address)
            ready[name] = (open.enter_context(neighbour(server.address)), tenant.text(PROMPT, TEXT))
            open.callback(tenant.wire.close)
        for _, name in itertools.product(range(ROUNDS), QUOTAS):
            found[name].append(windows(*ready[name]))
            print(name, found[name][-1], flush=True)
    return found


def slower(pairs: list[tuple[Waited, Waited]], what: str = "p99_ms") -> float:
    return statistics.median(getattr(beside, what) / getattr(alone, what) for alone, beside in pairs)


def cells(name: str, pairs: list[tuple[Waited, Waited]]) -> tuple[object, ...]:
    def each(what: str) -> str:
        sides = zip(*pairs, strict=True)
        return " / ".join(f"{statistics.median(getattr(w, what) for w in side):.0f}" for side in sides)

    figures = (each(what) for what in ("steps", "p50_ms", "p99_ms", "most_ms"))
    return (name, *figures, f"{slower(pairs, 'p50_ms'):.2f}", f"{slower(pairs):.2f}")


def table(held: Memory, waited: dict[str, list[tuple[Waited, Waited]]]) -> str:
    resident_mb = " / ".join(f"{each / MB:.0f}" for each in (held.base, held.tenants[0], held.tenants[-1]))
    rows = [
        ("a tenant's adapter / optimizer, MB", f"{held.adapter / MB:.1f} / {held.optimizer / MB:.1f}"),
        ("RSS before any tenant / with one / with 8, MB", resident_mb),
        (f"8 over one, in 8 x (adapter + optimizer) (wanted <= {WANTED_MEMORY})", f"{held.over_one:.2f}"),
        ("each tenant after the first, in (adapter + optimizer)", f"{held.further:.2f}"),
        ("8 over none, in 8 x (adapter + optimizer)", f"{held.over_none:.2f}"),
    ]
    wanted = f"p99 beside / alone (wanted <= {WANTED_SLOWER} with a quota)"
    sides = ("steps", "p50, ms", "p99, ms", "longest, ms")
    header = ("quota", *(f"{side}: alone / beside" for side in sides), "p50 beside / alone", wanted)
    return "\n\n".join(
        (
            markdown(("memory of the server", "figure"), rows),
            markdown(header, [cells(*each) for each in waited.items()]),
            f"Medians of {ROUNDS} pairs of windows of {SECONDS:g} s, those of a pair one after the other.",
        )
    )


def main() -> None:
    torch.set_num_threads(1)
    folder = bundled_model()
    with tempfile.TemporaryDirectory() as state:
        held = memory(folder, state)
        print(held, flush=True)
        waited = waiting(folder, state)
    figures = {
        "memory": asdict(held) | {"further": held.further, "over_one": held.over_one},
        "slower": {name: slower(pairs) for name, pairs in waited.items()},
        "windows": {
            name: [[asdict(each) for each in pair] for pair in pairs] for name, pairs in waited.items()
        },
    }
    write("tenants", figures, table(held, waited))
    if held.over_one > WANTED_MEMORY or slower(waited[WITH]) > WANTED_SLOWER:
        sys.exit("a tenant takes too much, of the memory or of the others' time")


if __name__ == "__main__":
    main()
