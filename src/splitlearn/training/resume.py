"""Which checkpoints a training may go on from: those that both sides have, the newest first."""

from __future__ import annotations

import logging
from pathlib import Path

from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.errors import CheckpointError, RunLost, another_training
from splitlearn.training.checkpoint import NOTE, Note, note_of, unfinished_checkpoints, whole_checkpoints
from splitlearn.wire.messages import RunFacts

log = logging.getLogger("splitlearn")


def common_checkpoints(trunk: RemoteTrunk, wanted: str | bool, output_dir: Path) -> list[Path]:
    """The trainer's folders whose other half the server lists; with `True` all, else the one that is named.

    Raises:
        CheckpointError: there is none.
    """
    whole = _own(trunk, output_dir) if wanted is True else _named(Path(str(wanted)))
    if not whole:
        raise CheckpointError(
            f"{output_dir if wanted is True else wanted} has no checkpoint of SplitTrainer "
            "that is whole: train from the start, without resume_from_checkpoint"
        )
    if trunk.is_shared:
        # The server's half is always the newest; this member goes on from its own step.
        return [folder for folder, _ in whole]
    server = _server_has(trunk, whole[0][1].run)
    common = [folder for folder, note in whole if _is_half(note, server)]
    if not common:
        if others := [note.step for _, note in whole if note.step in server.checkpoints]:
            raise another_training(server.name, others)
        raise CheckpointError(
            f"the server has none of this run's checkpoints (steps {[note.step for _, note in whole]}), it "
            f"has {list(server.checkpoints) or 'none'}: train from the start under another run name"
        )
    for folder, note in whole:
        if folder == common[0]:
            break
        if note.step in server.checkpoints:
            skip(folder, another_training(server.name, [note.step]).message)
        else:
            skip(folder, f"the server has no checkpoint of step {note.step}")
    return common


def _is_half(note: Note, server: RunFacts) -> bool:
    """The server has this very checkpoint's other half, not one of the same name and step."""
    if note.step not in server.checkpoints:
        return False
    there = server.digest_of(note.step)
    # The server does not know the digest of a torn one, and says so when it is asked for it.
    return note.trunk == there or 0 in (note.trunk, there)


def skip(folder: Path, why: str) -> None:
    """Nobody goes back further than was expected without being told."""
    log.warning("%s is skipped, training goes on from an older checkpoint: %s", folder, why)


def _named(folder: Path) -> list[tuple[Path, Note]]:
    note = note_of(folder)
    return [] if note is None else [(folder, note)]


def _own(trunk: RemoteTrunk, output_dir: Path) -> list[tuple[Path, Note]]:
    """Those of this run, or of the newest where this one's name is nobody's choice."""
    whole = whole_checkpoints(output_dir)
    if not whole:
        return []
    for folder in unfinished_checkpoints(output_dir, newer_than=whole[0][0]):
        skip(folder, f"its {NOTE} is missing or torn, so it was never finished or was changed since")
    planned = trunk.planned
    name = planned.name if planned is not None and trunk.is_named else whole[0][1].run
    return [(folder, note) for folder, note in whole if note.run == name]


def _server_has(trunk: RemoteTrunk, name: str) -> RunFacts:
    try:
        return trunk.transport.run_facts(name)
    except RunLost:
        return RunFacts(name)
