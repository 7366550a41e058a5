"""The client's half: on the disk before it counts, and put back only into what it was taken from."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from splitlearn.errors import CheckpointError
from splitlearn.training.checkpoint import (
    NOTE,
    WEIGHTS,
    complete,
    note_of,
    put_weights,
    read_weights,
    save_weights,
)


def test_what_was_saved_comes_back(tmp_path) -> None:
    model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    save_weights(model, tmp_path)
    put_weights(other, read_weights(other, tmp_path))
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, model.bias)


def test_another_dtype_is_refused_and_both_are_named(tmp_path) -> None:
    save_weights(nn.Linear(2, 3), tmp_path)
    half = nn.Linear(2, 3, dtype=torch.bfloat16)
    before = half.weight.detach().clone()
    with pytest.raises(
        CheckpointError, match=r"as float32 \[3, 2\], this model as bfloat16 \[3, 2\].*dtype="
    ):
        read_weights(half, tmp_path)
    assert torch.equal(half.weight, before)


def test_another_shape_is_refused_and_both_are_named(tmp_path) -> None:
    save_weights(nn.Linear(2, 3, bias=False), tmp_path)
    with pytest.raises(CheckpointError, match=r"weight as float32 \[3, 2\], this model as float32 \[3, 4\]"):
        read_weights(nn.Linear(4, 3, bias=False), tmp_path)


def test_a_part_that_is_only_on_one_side_is_named(tmp_path) -> None:
    save_weights(nn.Linear(2, 3, bias=False), tmp_path)
    with pytest.raises(CheckpointError, match="bias is not in it"):
        read_weights(nn.Linear(2, 3), tmp_path)
    save_weights(nn.Linear(2, 3), tmp_path)
    with pytest.raises(CheckpointError, match="bias is not trained here"):
        read_weights(nn.Linear(2, 3, bias=False), tmp_path)


def test_the_note_names_the_other_half_and_one_from_before_does_not(tmp_path) -> None:
    save_weights(nn.Linear(2, 3), tmp_path)
    complete(tmp_path, "notes", 3, 2**64 - 1)
    note = note_of(tmp_path)
    assert note is not None
    assert (note.run, note.step, note.trunk) == ("notes", 3, 2**64 - 1)
    (tmp_path / NOTE).write_text((tmp_path / NOTE).read_text().replace(f', "trunk": {2**64 - 1}', ""))
    old = note_of(tmp_path)
    assert old is not None
    assert old.trunk == 0


def test_the_folder_is_on_the_disk_before_its_note_and_its_name_after(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "checkpoint-3"
    save_weights(nn.Linear(2, 3), folder)
    done: list[Path] = []
    fsync, rename = os.fsync, Path.rename

    def noted(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", lambda self, to: done.append(to) or rename(self, to))
    complete(folder, "notes", 3)
    counts = done.index(folder / NOTE)
    assert {folder / WEIGHTS, folder} <= set(done[:counts])
    assert done[counts + 1 :] == [folder, tmp_path]
