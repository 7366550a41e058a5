"""Whether this machine has room and processors for a client of this model."""

from __future__ import annotations

import os

import torch

from splitlearn.cli.checks import Check, failed, ok, skipped, warning
from splitlearn.cli.memory import free_memory_bytes
from splitlearn.cli.options import BOTTOM_LAYERS, TOP_LAYERS
from splitlearn.cli.sizes import show_bytes
from splitlearn.errors import SplitPlanError
from splitlearn.model.attention import Device, choose_attention
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.plan import SplitPlan
from splitlearn.model.weights import resolve_dtype

LIBRARIES_BYTES = 600_000_000
"""What python, torch, transformers and gRPC take before any model, roughly."""
HERE = ("127.0.0.1", "localhost", "[::1]")


def check_threads(trunk: str | None) -> Check:
    """Two processes that each take all cores slow each other down severalfold."""
    threads = torch.get_num_threads()
    found = f"{threads} of {os.cpu_count()} cores"
    is_here = trunk is not None and trunk.rpartition(":")[0] in HERE
    if is_here and threads > 1 and "OMP_NUM_THREADS" not in os.environ:
        found += ", and the trunk is on this machine too"
        return warning("threads", found, "set OMP_NUM_THREADS=1 for each of the two")
    return ok("threads", found)


def check_gpu() -> Check:
    if not torch.cuda.is_available():
        return ok("gpu", "none that torch can use: what runs here runs on the CPU")
    free, total = torch.cuda.mem_get_info()
    return ok("gpu", f"{torch.cuda.get_device_name()}, {show_bytes(free)} of {show_bytes(total)} free")


def check_attention(checkpoint: Checkpoint | None) -> Check:
    """What a trunk of this model, served from here, would attend with."""
    if checkpoint is None:
        return skipped("attention", "depends on the model: splitlearn doctor MODEL")
    device = Device.of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = choose_attention("auto", checkpoint.config, resolve_dtype("auto", checkpoint), device)
    return ok("attention", f"a trunk served here takes {chosen.implementation} ({chosen.reason})")


def check_memory(checkpoint: Checkpoint | None) -> Check:
    free = free_memory_bytes()
    if free is None:
        return skipped("memory", "this system does not say how much is free")
    needed = LIBRARIES_BYTES + (client_bytes(checkpoint) if checkpoint else 0)
    found = f"{show_bytes(free)} free, a client takes about {show_bytes(needed)}"
    if free < needed:
        return failed("memory", found, "end other programs, or keep fewer layers here")
    return ok("memory", found)


def client_bytes(checkpoint: Checkpoint) -> int:
    """Bottom and top as they are stored: at the slice's own cut, or at the default one."""
    if checkpoint.note is not None:
        plan = checkpoint.note.plan
    else:
        try:
            plan = SplitPlan.for_config(checkpoint.config, BOTTOM_LAYERS, TOP_LAYERS)
        except SplitPlanError:
            return 0
    entries = checkpoint.entries(checkpoint.keys_of("client", plan))
    return sum(entry.num_bytes for _, entry in entries.values())
