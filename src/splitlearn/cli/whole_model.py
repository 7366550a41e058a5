"""The whole model, loaded by the library alone: what the split one is compared with."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM
from transformers.utils import logging

from splitlearn.errors import CheckpointError
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.weights import resolve_dtype


def load_whole(model: str, dtype: str = "auto") -> Any:
    """Raises CheckpointError for a slice, which is not the whole."""
    checkpoint = Checkpoint.open(model)
    if checkpoint.note is not None:
        raise CheckpointError(f"{model} is a slice of a model: give the whole model's folder or hub id")
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(model, dtype=resolve_dtype(dtype, checkpoint)).eval()
