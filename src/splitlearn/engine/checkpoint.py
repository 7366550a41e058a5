"""Runs on disk: a checkpoint is written whole or not at all, and read only if it is what was written."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
import threading
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from splitlearn.disk import append, claimed, digest, is_claimed, make_folder, sizes_below, sync
from splitlearn.engine import offers
from splitlearn.engine.checkpoint_note import NOTE, digest_of_note, settings_of, short_digest
from splitlearn.engine.disk_budget import DiskBudget
from splitlearn.engine.offers import CohortSnapshot
from splitlearn.errors import CheckpointError, another_training, first_line
from splitlearn.vocabulary import RunSettings

FORMAT = 2
"""1 knew no cohorts; it is read as a private run."""
WEIGHTS, OPTIMIZER = "adapter.safetensors", "optimizer.safetensors"
KEPT, LEDGER = "kept.safetensors", "ledger.jsonl"
ROUNDS_KEPT = 2
HEADER_BYTES, NOTE_BYTES = 128, 1024
"""More than a tensor's entry takes in its file, and more than a note takes beside its settings."""
STEP_FOLDER = re.compile(r"step-(\d{8})")
UNFINISHED, FORMER = "unfinished-", "-former"


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """A run as it stood after `step` optimizer steps: copies, on the CPU."""

    name: str
    step: int
    version: int
    skipped: int
    settings: RunSettings
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    cohort: CohortSnapshot | None = None


class RunStore:
    """Checkpoints below one folder, `NAME/step-NNNNNNNN` each. Called by any thread but the engine's."""

    def __init__(self, folder: Path, budget: DiskBudget | None = None) -> None:
        self._folder = folder
        self._budget = budget
        self.writing = threading.Lock()
        """Held from a round's snapshot until it is written: what was deleted is not written afterwards."""

    def steps(self, name: str) -> tuple[int, ...]:
        """The steps at which this run has a checkpoint, oldest first."""
        return tuple(sorted(step for step, _ in self._checkpoints(name)))

    def digests(self, name: str) -> dict[int, int]:
        """By step, what tells a checkpoint from any other of the same name and step; 0 if it is torn."""
        return {step: short_digest(folder) for step, folder in sorted(self._checkpoints(name))}

    def names(self) -> list[str]:
        """The runs that have anything here, whole or not: all of it counts, and can be deleted."""
        return sorted(each.name for each in self._runs() if self.has(each.name))

    def has(self, name: str) -> bool:
        """Whether anything of this run is here, whole or not."""
        return next((self._folder / name).glob("*"), None) is not None

    def write(self, snapshot: RunSnapshot) -> None:
        """Have it on the disk, in place of an older one of this step.

        Raises:
            CheckpointError: it cannot be written; ResourceExhausted: all runs together would take too much
                disk. What was there before stays as it is.
        """
        target = self._folder / snapshot.name / f"step-{snapshot.step:08d}"
        unfinished = target.with_name(f"{UNFINISHED}{secrets.token_hex(8)}")
        former = unfinished.with_name(f"{unfinished.name}{FORMER}")
        what = f"step {snapshot.step} of run {snapshot.name}"
        with self._room_for(snapshot, unfinished, what):
            try:
                make_folder(unfinished)
                with claimed(unfinished):
                    _write_files(snapshot, unfinished)
                    if target.exists():
                        target.rename(former)
                    unfinished.rename(target)
                    sync(target.parent)
            except (OSError, SafetensorError) as error:
                with contextlib.suppress(OSError):
                    _put_back(former, target)
                shutil.rmtree(unfinished, ignore_errors=True)
                raise CheckpointError(
                    f"{what} could not be saved ({_why(error)}): "
                    "make room in the server's --state-dir; the checkpoint before it is still there"
                ) from None
            shutil.rmtree(former, ignore_errors=True)

    def keep_round(self, snapshot: RunSnapshot) -> None:
        """A cohort's run as it stands, after its ledger; of the older ones the last stays.

        Raises:
            CheckpointError, ResourceExhausted: as `write`.
        """
        assert snapshot.cohort is not None
        folder = self._folder / snapshot.name
        try:
            if not folder.exists():
                make_folder(folder)
            append(folder / LEDGER, snapshot.cohort.offset, snapshot.cohort.lines)
        except OSError as error:
            raise CheckpointError(
                f"the ledger of run {snapshot.name} could not be written ({_why(error)}): make room in the "
                "server's --state-dir; what was written before is still there"
            ) from None
        self.write(snapshot)
        self.forget_before(snapshot.name, self.steps(snapshot.name)[-ROUNDS_KEPT:][0])

    def ledger(self, name: str) -> list[str]:
        """The lines of a cohort's ledger that the newest checkpoint covers.

        Raises:
            CheckpointError: it is shorter than that.
        """
        newest = self.read(name, self.steps(name)[-1])
        end = newest.cohort.offset if newest.cohort is not None else 0
        text = (self._folder / name / LEDGER).read_bytes() if end else b""
        if len(text) < end:
            raise CheckpointError(
                f"the ledger of run {name} is torn: {len(text):,} of {end:,} bytes are there"
            )
        return text[:end].decode().splitlines()

    def clear_up(self) -> None:
        """What a killed server left unfinished goes; a checkpoint that it had put aside comes back."""
        for run in self._runs():
            for left in run.glob(f"{UNFINISHED}*"):
                if not is_claimed(left.with_name(left.name.removesuffix(FORMER))):
                    _clear(left)
            with contextlib.suppress(OSError):
                run.rmdir()

    def read(self, name: str, step: int, wanted: int = 0) -> RunSnapshot:
        """The checkpoint of this step, if it has the digest that is wanted; 0 takes any.

        Raises:
            CheckpointError: it is not there, torn, changed, another one, or of a newer version.
        """
        folder = self._folder / name / f"step-{step:08d}"
        if not (folder / NOTE).is_file():
            raise CheckpointError(
                f"run {name} has no checkpoint of step {step} here; it has {list(self.steps(name)) or 'none'}"
            )
        try:
            note = json.loads((folder / NOTE).read_text())
            if note["format"] > FORMAT:
                raise CheckpointError(
                    f"step {step} of run {name} was written by a newer version of splitlearn: update this one"
                )
            if note.pop("digest") != digest_of_note(note):
                raise CheckpointError(_torn(name, step))
            if wanted not in (0, short_digest(folder)):
                raise another_training(name, [step])
            for file, written in note["digests"].items():
                if digest(folder / file) != written:
                    raise CheckpointError(_torn(name, step))
            return RunSnapshot(
                name,
                note["step"],
                note["version"],
                note["skipped"],
                settings_of(note["settings"]),
                load_file(folder / WEIGHTS),
                load_file(folder / OPTIMIZER),
                _cohort(note.get("cohort"), folder),
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            raise CheckpointError(_torn(name, step)) from None

    def forget_before(self, name: str, step: int, kept: Container[int] = ()) -> None:
        """Both sides hold this step: older checkpoints but `kept`, and writes that never ended, may go.

        Where it is not here, nothing goes: it is not what both sides have.
        """
        if step not in self.steps(name):
            return
        for older, folder in self._checkpoints(name):
            if older < step and older not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        for unfinished in (self._folder / name).glob(f"{UNFINISHED}*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def delete(self, name: str) -> int:
        """Remove all that the run has on disk; the bytes that this frees."""
        with self.writing:
            freed = self.bytes(name)
            shutil.rmtree(self._folder / name, ignore_errors=True)
        return freed

    def folder(self, name: str) -> tuple[Path, DiskBudget | None]:
        """Where all of this run lies, and what everything there is counted in."""
        return self._folder / name, self._budget

    def bytes(self, name: str) -> int:
        """Bytes on the disk; what comes and goes meanwhile may be missed."""
        return sum(size for _, size in sizes_below(self._folder / name))

    def _room_for(
        self, snapshot: RunSnapshot, unfinished: Path, what: str
    ) -> contextlib.AbstractContextManager[None]:
        if self._budget is None:
            return contextlib.nullcontext()
        return self._budget.reserved(unfinished, _bytes_of(snapshot), what)

    def _runs(self) -> Iterator[Path]:
        if self._folder.is_dir():
            yield from (each for each in self._folder.iterdir() if each.is_dir())

    def _checkpoints(self, name: str) -> Iterator[tuple[int, Path]]:
        folder = self._folder / name
        if folder.is_dir():
            for each in folder.iterdir():
                if (found := STEP_FOLDER.fullmatch(each.name)) and (each / NOTE).is_file():
                    yield int(found[1]), each


def _write_files(snapshot: RunSnapshot, folder: Path) -> None:
    save_file(dict(snapshot.weights), folder / WEIGHTS)
    save_file(dict(snapshot.optimizer), folder / OPTIMIZER)
    if snapshot.cohort is not None:
        save_file(dict(offers.tensors(snapshot.cohort.kept)), folder / KEPT)
    note = {
        "format": FORMAT,
        "step": snapshot.step,
        "version": snapshot.version,
        "skipped": snapshot.skipped,
        "settings": asdict(snapshot.settings),
        "cohort": None if snapshot.cohort is None else offers.told(snapshot.cohort),
        "digests": {file.name: digest(file) for file in sorted(folder.iterdir())},
    }
    note["digest"] = digest_of_note(note)
    (folder / NOTE).write_text(json.dumps(note, indent=1))
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def _clear(left: Path) -> None:
    """Of a killed server: away with it, unless it is the only one of its step."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if left.name.endswith(FORMER):
            step = json.loads((left / NOTE).read_text())["step"]
            _put_back(left, left.with_name(f"step-{step:08d}"))
    shutil.rmtree(left, ignore_errors=True)


def _put_back(former: Path, target: Path) -> None:
    if former.is_dir() and not target.exists():
        former.rename(target)
        sync(target.parent)


def _bytes_of(snapshot: RunSnapshot) -> int:
    """At least what its files will take."""
    tensors = {**snapshot.weights, **snapshot.optimizer}
    note = len(json.dumps(asdict(snapshot.settings), indent=1))
    if (cohort := snapshot.cohort) is not None:
        tensors |= dict(offers.tensors(cohort.kept))
        note += len(json.dumps(offers.told(cohort), indent=1)) + cohort.end - cohort.offset
    headers = sum(HEADER_BYTES + len(name.encode()) for name in tensors)
    return sum(each.nbytes for each in tensors.values()) + headers + 2 * note + NOTE_BYTES


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def _cohort(told: dict[str, Any] | None, folder: Path) -> CohortSnapshot | None:
    return None if told is None else offers.restored(told, load_file(folder / KEPT))


def _torn(name: str, step: int) -> str:
    return (
        f"the checkpoint of step {step} of run {name} is torn or was changed since it was written: "
        "go back to an older one"
    )
