"""The note in a checkpoint's folder: what its run was opened with, and its digest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from splitlearn.vocabulary import (
    CohortSettings,
    LoraSettings,
    OptimizerSettings,
    Precision,
    RunSettings,
    ShareSettings,
    TapeSettings,
)

NOTE = "run.json"
DIGEST_DIGITS = 16


def short_digest(folder: Path) -> int:
    """Of the note, and so of the files whose digests stand in it; never 0 where it can be read."""
    try:
        return int(json.loads((folder / NOTE).read_text())["digest"][:DIGEST_DIGITS], 16) or 1
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def digest_of_note(note: Mapping[str, Any]) -> str:
    """Of all that stands in it but the digest itself."""
    return xxhash.xxh3_128_hexdigest(json.dumps(note, sort_keys=True).encode())


def settings_of(told: Mapping[str, Any]) -> RunSettings:
    """What a note tells; raises KeyError or TypeError for anything else."""
    lora = dict(told["lora"])
    for name in ("target_modules", "exclude_modules"):
        lora[name] = tuple(lora[name])
    return RunSettings(
        **{
            **told,
            "lora": LoraSettings(**lora),
            "optimizer": OptimizerSettings(**told["optimizer"]),
            "tape": TapeSettings(**told["tape"]),
            "precision": Precision(**told["precision"]),
            "cohort": CohortSettings(**told.get("cohort", {})),
            "share": ShareSettings(**told.get("share", {})),
        }
    )
