"""What the system says of memory: how much is free, and the most that a process has held."""

from __future__ import annotations

import os
from pathlib import Path


def free_memory_bytes() -> int | None:
    """What programs could still take; None where the system does not say."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def peak_memory_bytes(process: int | None = None) -> int | None:
    """The most that a process (this one by default) has held at once; None where the system does not say."""
    return _kilobytes(Path(f"/proc/{process or os.getpid()}/status"), "VmHWM")


def _kilobytes(file: Path, name: str) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None
