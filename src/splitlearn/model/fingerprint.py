"""Whether client and server hold parts of one model: figures that both can make."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedConfig

from splitlearn.model.plan import SplitPlan
from splitlearn.model.safetensors_file import TensorEntry

SAMPLES = 4
SAMPLE_BYTES = 64

_WITHOUT_EFFECT = frozenset(
    {
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "partial_rotary_factor",  # stands in rope_parameters too
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of a configuration that change no activation; neither do those that begin with `_`."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Equal for two folders of one model, cut alike; an instruct version is not its base.

    `split` is (first trunk layer, first top layer, layers).
    """

    config_hash: str
    split: tuple[int, int, int]
    weights_hash: str

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Fingerprint:
        first, after, layers = told["split"]
        split = (int(first), int(after), int(layers))
        return cls(str(told["config_hash"]), split, str(told["weights_hash"]))


def split_of(plan: SplitPlan) -> tuple[int, int, int]:
    return plan.trunk.start, plan.trunk.stop, plan.num_layers


def hash_config(config: PreTrainedConfig) -> str:
    """Over what differs from the class's defaults.

    A field that another version of the library adds, or does not know yet, changes nothing here.
    """
    defaults = _effective(type(config)().to_dict())
    fields = {
        name: value
        for name, value in _effective(config.to_dict()).items()
        if name == "model_type" or value != defaults.get(name, value)
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True, default=str).encode())


def _effective(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _effective(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if not name.startswith("_") and name not in _WITHOUT_EFFECT
    }


def hash_weights(entries: Mapping[str, tuple[Path, TensorEntry]]) -> str:
    """Over every tensor's name, dtype and shape, and a few of its bytes."""
    total = xxhash.xxh3_128()
    for name, (path, entry) in sorted(entries.items()):
        total.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
        with path.open("rb") as file:
            for place in _sample_places(entry):
                file.seek(place)
                total.update(file.read(min(SAMPLE_BYTES, entry.stop - place)))
    return total.hexdigest()


def _sample_places(entry: TensorEntry) -> Iterable[int]:
    """The start, the end and evenly between, the same in every file that holds the tensor."""
    last = max(entry.num_bytes - SAMPLE_BYTES, 0)
    return (entry.start + last * place // (SAMPLES - 1) for place in range(SAMPLES))
