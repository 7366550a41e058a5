"""The client's half of a checkpoint: its weights in the trainer's folder, and a note that makes it whole."""

from __future__ import annotations

import json
import os
import re
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from splitlearn.errors import CheckpointError

WEIGHTS, NOTE = "client.safetensors", "splitlearn.json"
FORMAT = 1
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class Note:
    """Written last: a folder with it is whole on this side, and names its other half."""

    run: str
    step: int
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


def complete(folder: Path, note: Note) -> None:
    """Have the folder's files on the disk, then say that they are whole."""
    for file in folder.iterdir():
        if file.is_file():
            _sync(file)
    unfinished = folder / f"{NOTE}.{secrets.token_hex(4)}"
    unfinished.write_text(json.dumps(asdict(note)))
    _sync(unfinished)
    unfinished.rename(folder / NOTE)
    _sync(folder)


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


def whole_checkpoints(output_dir: Path) -> list[tuple[Path, Note]]:
    """The trainer's checkpoints that are whole on this side, newest first."""
    found = []
    if output_dir.is_dir():
        for folder in output_dir.iterdir():
            if CHECKPOINT.fullmatch(folder.name) and (note := note_of(folder)) is not None:
                found.append((folder, note))
    return sorted(found, key=lambda each: each[1].step, reverse=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
