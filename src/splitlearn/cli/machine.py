"""What this machine has: packages, memory, processors; read from where the system writes it down."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement


def free_memory_bytes() -> int | None:
    """What programs could still take; None where the system does not say."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def peak_memory_bytes(process: int | None = None) -> int | None:
    """The most that a process (this one by default) has held at once; None where the system does not say."""
    return _kilobytes(Path(f"/proc/{process or os.getpid()}/status"), "VmHWM")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def wanted(package: str) -> Requirement:
    """What the installed splitlearn says of a package that it needs."""
    for line in requires("splitlearn") or ():
        requirement = Requirement(line)
        if requirement.name == package and requirement.marker is None:
            return requirement
    return Requirement(package)


def _kilobytes(file: Path, name: str) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None
