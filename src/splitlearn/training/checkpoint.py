"""The client's half of a checkpoint: its weights in the trainer's folder, and a note that makes it whole."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from splitlearn.disk import digest, sync
from splitlearn.errors import CheckpointError
from splitlearn.wire.dtypes import dtype_name

WEIGHTS, NOTE = "client.safetensors", "splitlearn.json"
FORMAT = 1
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class Note:
    """Written last: a folder with it is whole on this side, and names its other half."""

    run: str
    step: int
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of the folder's files, by their names."""
    trunk: int = 0
    """The digest of the server's half; 0 where the note is older than that."""
    format: int = FORMAT


def save_weights(model: nn.Module, folder: Path) -> None:
    """What of the client is trained, by its parameters' names."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: each.detach().cpu().contiguous() for name, each in _trained(model).items()}
    save_file(weights, folder / WEIGHTS)


def read_weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Raises CheckpointError where the folder is not a checkpoint of what this model trains."""
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError):
        raise CheckpointError(
            f"{folder} has no readable {WEIGHTS}: it is no checkpoint of SplitTrainer, or a torn one"
        ) from None
    trained = {name: _form(each) for name, each in _trained(model).items()}
    there = {name: _form(each) for name, each in weights.items()}
    if trained.keys() != there.keys():
        name = min(trained.keys() ^ there.keys())
        raise CheckpointError(
            f"{folder} was trained with other LoRA settings, another cut, or other parts frozen or in full "
            f"({name} is {'not in it' if name in trained else 'not trained here'}): load the model as it was "
            "loaded then"
        )
    for name, form in trained.items():
        if there[name] != form:
            raise CheckpointError(
                f"{folder} has {name} as {there[name]}, this model as {form}: load the model with the dtype= "
                "and the LoRA settings that it had then"
            )
    return weights


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """What `read_weights` gave."""
    for name, parameter in _trained(model).items():
        parameter.copy_(weights[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def _form(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def complete(folder: Path, run: str, step: int, trunk: int = 0) -> None:
    """Have the folder's files on the disk, then say that they are whole, and by its digest the other half."""
    digests = {}
    for file in folder.iterdir():
        if file.is_file():
            sync(file)
            digests[file.name] = digest(file)
    sync(folder)
    note = Note(run, step, digests, trunk)
    unfinished = folder / f"{NOTE}.{secrets.token_hex(4)}"
    unfinished.write_text(json.dumps(asdict(note)))
    sync(unfinished)
    unfinished.rename(folder / NOTE)
    sync(folder)
    # Or the whole folder could be gone after a power loss, and the server have let go of older steps.
    sync(folder.parent)


def note_of(folder: Path) -> Note | None:
    """None where the folder is not whole.

    Raises:
        CheckpointError: a newer version wrote it.
    """
    try:
        told = json.loads((folder / NOTE).read_text())
        note = Note(**told)
    except (OSError, ValueError, TypeError):
        return None
    if note.format > FORMAT:
        raise CheckpointError(f"{folder} was written by a newer version of splitlearn: update this one")
    return note


def require_as_written(folder: Path, note: Note) -> None:
    """Raises CheckpointError where a file is not what was written; files that came later may be there."""
    for name, written in note.digests.items():
        file = folder / name
        if not file.is_file() or digest(file) != written:
            raise CheckpointError(
                f"{file} is torn, gone or was changed since it was written: resume from an older checkpoint"
            )


def whole_checkpoints(output_dir: Path) -> list[tuple[Path, Note]]:
    """The trainer's checkpoints that are whole on this side, newest first."""
    noted = [(folder, note_of(folder)) for folder in _checkpoints(output_dir)]
    found = [(folder, note) for folder, note in noted if note is not None]
    return sorted(found, key=lambda each: each[1].step, reverse=True)


def unfinished_checkpoints(output_dir: Path, newer_than: Path) -> list[Path]:
    """Newer ones of the trainer's that are not whole, newest first."""
    newer = [each for each in _checkpoints(output_dir) if _number(each) > _number(newer_than)]
    return sorted((each for each in newer if note_of(each) is None), key=_number, reverse=True)


def _checkpoints(output_dir: Path) -> list[Path]:
    every = output_dir.iterdir() if output_dir.is_dir() else ()
    return [folder for folder in every if CHECKPOINT.fullmatch(folder.name)]


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
