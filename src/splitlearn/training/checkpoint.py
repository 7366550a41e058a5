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
from torch import nn

from splitlearn.disk import digest, sync
from splitlearn.errors import CheckpointError

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
    format: int = FORMAT


def save_weights(model: nn.Module, folder: Path) -> None:
    """What of the client is trained, by its parameters' names."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    save_file(weights, folder / WEIGHTS)


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Raises CheckpointError where the folder is not a checkpoint of this model's adapter."""
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError):
        raise CheckpointError(
            f"{folder} has no readable {WEIGHTS}: it is no checkpoint of SplitTrainer, or a torn one"
        ) from None
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if {name: each.shape for name, each in trained.items()} != {
        name: each.shape for name, each in weights.items()
    }:
        raise CheckpointError(
            f"{folder} was trained with other LoRA settings, another cut, or other parts frozen or in full: "
            "load the model as it was loaded then"
        )
    for name, parameter in trained.items():
        parameter.copy_(weights[name])


def complete(folder: Path, run: str, step: int) -> None:
    """Have the folder's files on the disk, then say that they are whole."""
    digests = {}
    for file in folder.iterdir():
        if file.is_file():
            sync(file)
            digests[file.name] = digest(file)
    note = Note(run, step, digests)
    unfinished = folder / f"{NOTE}.{secrets.token_hex(4)}"
    unfinished.write_text(json.dumps(asdict(note)))
    sync(unfinished)
    unfinished.rename(folder / NOTE)
    sync(folder)


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
