"""What all benchmarks share: a trunk server as its own process, and results with their circumstances."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
START_S = 180
STOP_S = 60
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, slots=True)
class Server:
    address: str
    pid: int


@contextmanager
def serving(model: Path, *flags: str) -> Iterator[Server]:
    """`splitlearn serve` with one thread, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "splitlearn.cli",
        "serve",
        str(model),
        "--port",
        "0",
        "--threads",
        "1",
        *flags,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise SystemExit(f"the server did not start: {line or 'it ended'}")
        yield Server(line.removeprefix("listening on ").strip(), process.pid)
    finally:
        process.terminate()
        process.wait(STOP_S)


def peak_memory_mb(pid: int | str = "self") -> float:
    """The most that the process held in memory at once (VmHWM), file pages that it mapped included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this system does not tell a process's peak memory")


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of pairs measured one after the other, so that what else the machine does hits both alike."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def write(name: str, figures: Any, table: str) -> None:
    """benchmarks/results/NAME.json and .md: figures, and how they were come by."""
    RESULTS.mkdir(exist_ok=True)
    circumstances = {
        "command": " ".join(["python", *map(_short, sys.argv)]),
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("+" if _git("status", "--porcelain", "src") else ""),
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "grpcio", "protobuf")}
        | {"python": platform.python_version()},
    }
    report = {"circumstances": circumstances, "figures": figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    said = "\n".join(f"- {key}: {value}" for key, value in circumstances.items())
    (RESULTS / f"{name}.md").write_text(f"# {name}\n\n{table}\n\n{said}\n")
    print(table)


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _short(argument: str) -> str:
    path = Path(argument)
    return (
        str(path.relative_to(Path.cwd()))
        if path.is_absolute() and path.is_relative_to(Path.cwd())
        else argument
    )


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
