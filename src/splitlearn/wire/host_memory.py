"""Memory of the host that a device reaches without detours, and that is not taken from the system anew.

A fresh page costs more than the copy into it; torch keeps pinned memory for the next that asks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """The tensor's values on the CPU, once they are all there; a CPU tensor as it is."""
    if tensor.is_cpu and not tensor.requires_grad:
        return tensor
    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def host_like(tensor: Tensor) -> Tensor:
    """Zeros that a copy to or from this tensor needs no detour for: pinned where it is on a GPU."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def host_buffer(size: int) -> Tensor:
    """(size,) bytes, uninitialised; pinned where this process uses a GPU."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=_uses_cuda())


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
