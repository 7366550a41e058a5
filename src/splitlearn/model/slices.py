"""Writing a folder with one side's tensors only, so that nobody need hold the rest."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import save_file

from splitlearn.errors import CheckpointError
from splitlearn.model.checkpoint import INDEX_FILE, WEIGHTS_FILE, Checkpoint, Side
from splitlearn.model.plan import SplitPlan
from splitlearn.model.slice_note import NOTE_FILE, SliceNote
from splitlearn.model.weights import fingerprint

SHARD_BYTES = 4_000_000_000

_TEXT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What the owner of the text needs beside the weights; the trunk's side gets none of it."""


def write_slice(
    checkpoint: Checkpoint,
    plan: SplitPlan,
    part: Side,
    output: str | Path,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write one side's folder; it is complete when it appears. Returns the folder.

    Raises:
        CheckpointError: the folder has something in it, or the source is a slice that lacks this.
    """
    output = Path(output)
    _check_empty(output)
    checkpoint.check_serves(part, plan)
    note = SliceNote(part, plan, fingerprint(checkpoint, plan))
    output.parent.mkdir(parents=True, exist_ok=True)
    growing = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        _write_weights(checkpoint, checkpoint.keys_of(part, plan), growing, shard_bytes)
        _copy(checkpoint, ["config.json", *(_TEXT_FILES if part == "client" else ())], growing)
        note.write(growing / NOTE_FILE)
        growing.chmod(0o755)
        growing.replace(output)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error}") from None
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    return output


def _check_empty(output: Path) -> None:
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise CheckpointError(f"{output} is not empty; name a new folder, or remove it first")


def _write_weights(checkpoint: Checkpoint, keys: list[str], folder: Path, shard_bytes: int) -> None:
    sizes = {key: entry.num_bytes for key, (_, entry) in checkpoint.entries(keys).items()}
    shards = list(_shards(keys, sizes, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = _shard_file(number, len(shards))
        save_file(checkpoint.read(names), str(folder / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shards(keys: Iterable[str], sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """Consecutive tensors up to the limit; one that is larger gets a shard of its own."""
    names: list[str] = []
    total = 0
    for key in keys:
        if names and total + sizes[key] > limit:
            yield names
            names, total = [], 0
        names.append(key)
        total += sizes[key]
    yield names


def _shard_file(number: int, count: int) -> str:
    return WEIGHTS_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _copy(checkpoint: Checkpoint, names: Iterable[str], folder: Path) -> None:
    for name in names:
        path = checkpoint.find(name)
        if path is not None:
            shutil.copyfile(path, folder / name)
