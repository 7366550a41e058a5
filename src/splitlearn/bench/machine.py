"""The circumstances of a measurement: without them a figure says little."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from splitlearn import __version__

PACKAGES = ("torch", "transformers", "grpcio", "protobuf")


def circumstances() -> dict[str, Any]:
    """Of now; `busy` is how many processes wanted a processor in the last minute, others' included."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "busy": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version(), "splitlearn": __version__},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
