"""Building the client's model, or the trunk, with only its own tensors read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from splitlearn.config import AttentionName
from splitlearn.errors import CheckpointError, SettingError
from splitlearn.model.attention import Device, choose_attention
from splitlearn.model.checkpoint import Checkpoint, Side
from splitlearn.model.families import causal_lm_class
from splitlearn.model.fingerprint import Fingerprint, hash_config, hash_weights, split_of
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment, client_class, trunk_class

_FILE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMED_IN_AN_ERROR = 3


_one_at_a_time = threading.Lock()
"""The library's loading changes what belongs to the process: of two threads, one finds weights missing."""


def load_client(
    checkpoint: Checkpoint,
    plan: SplitPlan,
    remote: Callable[[], nn.Module],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The library's own causal LM with bottom and top weights and `remote()` in the trunk's place."""
    whole_class = causal_lm_class(checkpoint.config)
    cut_class = client_class(whole_class, plan, remote)
    model = _load(cut_class, checkpoint, "client", plan, dtype, device, attn_implementation)
    model.config.name_or_path = model.name_or_path = checkpoint.source
    generation_file = checkpoint.find("generation_config.json")
    if generation_file is not None:
        model.generation_config = GenerationConfig.from_pretrained(str(generation_file.parent))
    return model


def load_trunk(
    checkpoint: Checkpoint,
    plan: SplitPlan,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    attention: AttentionName = "auto",
) -> TrunkSegment:
    """The trunk's layers with their weights, ready to run.

    Raises:
        SettingError: this attention is not possible here.
    """
    config, own_dtype = checkpoint.config, resolve_dtype(dtype, checkpoint)
    chosen = choose_attention(attention, config, own_dtype, Device.of(torch.device(device)))
    cut_class = trunk_class(causal_lm_class(config), plan)
    causal_lm = _load(cut_class, checkpoint, "trunk", plan, own_dtype, device, chosen.implementation)
    return TrunkSegment(causal_lm, plan, checkpoint.family, chosen.reason).eval()


def fingerprint(checkpoint: Checkpoint, plan: SplitPlan) -> Fingerprint:
    """Over the configuration and the bottom and top tensors, which both sides' folders know of."""
    note = checkpoint.note
    if note is not None:
        checkpoint.check_serves(note.side, plan)
    if note is not None and note.side == "trunk":
        weights_hash = note.fingerprint.weights_hash
    else:
        weights_hash = hash_weights(checkpoint.entries(checkpoint.keys_of("client", plan)))
    return Fingerprint(hash_config(checkpoint.config), split_of(plan), weights_hash)


def resolve_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint) -> torch.dtype:
    """What "auto" means for this checkpoint, the same for client and trunk."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return checkpoint.config.dtype or _stored_dtype(checkpoint, checkpoint.keys)
    known = {str(each).removeprefix("torch."): each for each in _FILE_DTYPES.values()}
    if dtype not in known:
        raise SettingError(f"dtype {dtype!r} is not known; take auto or one of {', '.join(sorted(known))}")
    return known[dtype]


def _load(
    cut_class: type[PreTrainedModel],
    checkpoint: Checkpoint,
    side: Side,
    plan: SplitPlan,
    dtype: str | torch.dtype,
    device: str | torch.device,
    attn_implementation: str | None,
) -> PreTrainedModel:
    checkpoint.check_serves(side, plan)
    keys, device = checkpoint.keys_of(side, plan), torch.device(device)
    # With mismatched sizes a fault like any other, where the library would not name the tensor.
    how: dict[str, Any] = {"dtype": resolve_dtype(dtype, checkpoint), "ignore_mismatched_sizes": True}
    if attn_implementation is not None:
        how["attn_implementation"] = attn_implementation
    if device.type != "cpu":
        how["device_map"] = {"": device}  # each tensor goes there as it is read
    stays_as_stored = device.type == "cpu" and how["dtype"] == _stored_dtype(checkpoint, keys)
    with _one_at_a_time, _quiet(), checkpoint.slices(keys, mapped=stays_as_stored) as tensors:
        try:
            model, told = cut_class.from_pretrained(
                None, config=checkpoint.config, state_dict=tensors, output_loading_info=True, **how
            )
        except RuntimeError as error:
            first_line = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"{checkpoint.source} cannot be loaded for the {side}: {first_line}"
            ) from error
    _check_complete(checkpoint, side, told)
    return model.eval()


def _check_complete(checkpoint: Checkpoint, side: Side, told: dict[str, Any]) -> None:
    """The library fills what is missing with random numbers; here it is an error."""
    faults = {
        "lacks": told["missing_keys"],
        "has too much": told["unexpected_keys"],
        "has another shape for": [name for name, *_ in told["mismatched_keys"]],
    }
    said = [f"{what} {_some(names)}" for what, names in faults.items() if names]
    if said:
        raise CheckpointError(
            f"{checkpoint.source} does not fit its configuration for the {side}: it "
            f"{'; it '.join(said)}. Download it again, or check that config.json is its own"
        )


def _some(names: Any) -> str:
    names = sorted(names)
    more = len(names) - _NAMED_IN_AN_ERROR
    return ", ".join(names[:_NAMED_IN_AN_ERROR]) + (f" and {more} more" if more > 0 else "")


def _stored_dtype(checkpoint: Checkpoint, keys: Iterable[str]) -> torch.dtype:
    """The first floating tensor's, as the library decides it where the configuration is silent."""
    for key in keys:
        _, entry = checkpoint.entries([key])[key]
        if entry.dtype in _FILE_DTYPES:
            return _FILE_DTYPES[entry.dtype]
    return torch.float32


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report: what goes wrong becomes one error."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
