"""What a device computes in by itself, and not by way of other instructions."""

from __future__ import annotations

import torch

from splitlearn.config import CompileMode

BFLOAT16_CAPABILITY = (8, 0)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has units that multiply matrices in bfloat16.

    A CUDA device from compute capability 8.0 on has, and a processor with AMX or AVX512-BF16. On others
    torch gets there by way of float32, which is slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False


def compile_mode(asked: CompileMode, device: torch.device) -> CompileMode:
    """What is compiled or recorded on this device; `auto` records where that saves launches of kernels."""
    if asked != "auto":
        return asked
    return "default" if device.type == "cuda" else "off"
