"""Which attention a trunk's layers use, and why: flash-attention, SDPA or eager."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedConfig

from splitlearn.config import AttentionName
from splitlearn.errors import SettingError, UnsupportedCall
from splitlearn.model.families import causal_lm_class, family_of

FLASH = "flash_attention_2"
"""The library's name of it."""
OLDEST = "2.6"
"""The first flash-attention with soft caps; what an older one is told of them, it does not do."""
CAPABILITY = (8, 0)
LARGEST_HEAD = 256
HALF = (torch.float16, torch.bfloat16)
COST = "flash-attention takes no masks by position: sessions run one by one, decode steps without graphs"


@dataclass(frozen=True, slots=True)
class Attention:
    """What was chosen, by the library's name, and why."""

    implementation: str
    reason: str


@dataclass(frozen=True, slots=True)
class Device:
    """What of a device decides whether flash-attention runs on it."""

    kind: str
    capability: tuple[int, int] = (0, 0)
    fault: str = ""
    """Why the package cannot be used; empty where it can."""

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """The package is looked at where there is a GPU for it, nowhere else."""
        if device.type != "cuda":
            return cls(device.type)
        return cls(device.type, torch.cuda.get_device_capability(device), package_fault())


def package_fault() -> str:
    """Why flash-attention cannot be imported, as far as one can see; empty where it can."""
    try:
        found = version("flash-attn")
        import flash_attn  # noqa: F401
    except PackageNotFoundError:
        return "it is not installed (pip install flash-attn)"
    except (ImportError, OSError) as error:
        return f"it cannot be imported ({str(error).strip().partition(chr(10))[0]})"
    return "" if Version(found) >= Version(OLDEST) else f"it is {found}, older than {OLDEST}"


def choose_attention(
    wanted: AttentionName, config: PreTrainedConfig, dtype: torch.dtype, device: Device
) -> Attention:
    """Flash-attention, then SDPA, then eager, of those that cost nothing: see decision 28.

    Raises:
        SettingError: what is wanted cannot be had here.
    """
    model_type, has_sdpa = config.model_type, causal_lm_class(config)._supports_sdpa
    batched, fault = family_of(config).batched, why_no_flash(config, dtype, device)
    if wanted == "flash":
        if fault:
            raise SettingError(f"attention 'flash' is not possible for {model_type}: {fault}; take 'auto'")
        return Attention(FLASH, f"asked for; {COST}" if batched else "asked for")
    if wanted == "sdpa" and not has_sdpa:
        raise SettingError(f"attention 'sdpa' is not possible: transformers has none for {model_type}")
    if wanted != "auto":
        return Attention(wanted, "asked for")
    if not fault and not batched:
        return Attention(FLASH, "installed, and sessions of this family run one by one with any other, too")
    passed_over = f"flash-attention: {fault}" if fault else COST
    if has_sdpa:
        return Attention("sdpa", passed_over)
    return Attention("eager", f"{passed_over}; SDPA: transformers has none for {model_type}")


def why_no_flash(config: PreTrainedConfig, dtype: torch.dtype, device: Device) -> str:
    """The first reason why this model cannot attend with it there; empty where it can."""
    if device.kind != "cuda":
        return f"it needs a CUDA device, this is {device.kind}"
    if device.capability < CAPABILITY:
        return f"it needs compute capability {_dotted(CAPABILITY)}, this has {_dotted(device.capability)}"
    if device.fault:
        return device.fault
    if dtype not in HALF:
        return f"it computes in bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    return _why_not_for(config)


def _why_not_for(config: PreTrainedConfig) -> str:
    """What the model asks of attention beyond what flash-attention does."""
    model_class = causal_lm_class(config)
    if not model_class._supports_flash_attn:
        return f"transformers has none for {config.model_type}"
    kernels = getattr(model_class, "_compatible_flash_implementations", None)
    if kernels is not None and FLASH not in kernels:
        return f"{config.model_type} needs another kernel"
    if getattr(config, "alibi", False):
        return "it knows no ALiBi"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "it knows no chunks"
    size = head_size(config)
    return f"its heads have up to {LARGEST_HEAD} values, these {size}" if size > LARGEST_HEAD else ""


def refuse_packed(position_ids: Tensor | None, implementation: str) -> None:
    """Where the library's masks part the examples of a row, this implementation has no masks."""
    if position_ids is not None and bool((position_ids.diff(dim=-1) < 0).any()):
        raise UnsupportedCall(
            f"positions begin anew within a row, and {implementation} does not part the examples of a row: "
            "train without packing, or start the server with --attention sdpa"
        )


def head_size(config: PreTrainedConfig) -> int:
    """Of queries and keys."""
    for name in ("qk_head_dim", "head_dim"):
        size = getattr(config, name, None)
        if isinstance(size, int):
            return size
    return int(config.hidden_size // config.num_attention_heads)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
