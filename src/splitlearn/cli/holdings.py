"""A file of examples as a folder: a file for each client, one held out, and who holds what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn.cli.scheme_settings import PartitionSettings
from splitlearn.disk import digest
from splitlearn.errors import DataError
from splitlearn.training import partition
from splitlearn.training.classes import Classes, classes_by, one_class
from splitlearn.training.held_out import held_out
from splitlearn.training.lines import Line

HELD_OUT = "held-out"
RECORD = "partition.json"


@dataclass(frozen=True, slots=True)
class Holding:
    """What one client gets, or what is held out."""

    name: str
    examples: Sequence[int]


@dataclass(frozen=True, slots=True)
class Partition:
    """All examples of a file, each of them held once."""

    file: Path
    settings: PartitionSettings
    lines: Sequence[Line]
    classes: Classes
    holdings: Sequence[Holding]
    """The clients', in order, then what is held out."""

    @classmethod
    def of(cls, file: Path, lines: Sequence[Line], settings: PartitionSettings) -> Partition:
        """Deal out the lines of the file.

        Args:
            settings: filled in.

        Raises:
            DataError: a line has no class, all have the same, or there are too few for so many clients.
            SettingError: a setting is out of its scheme's range.
        """
        classes = _classes(lines, settings)
        dealt, kept_back = held_out(range(len(lines)), settings.held_out, settings.seed)
        parts = _parts([classes.of_example[index] for index in dealt], settings)
        digits = max(2, len(str(len(parts))))
        holdings = [
            Holding(f"client-{number:0{digits}}", [dealt[place] for place in part])
            for number, part in enumerate(parts, start=1)
        ]
        if kept_back:
            holdings.append(Holding(HELD_OUT, kept_back))
        return cls(file, settings, lines, classes, holdings)

    @property
    def record(self) -> dict[str, Any]:
        """What was done, so that it can be done again, and who holds how much of what."""
        return {
            "file": self.file.name,
            "xxh3": digest(self.file),
            "settings": self.settings.told,
            "examples": len(self.lines),
            "classes": self.classes.counts(range(len(self.lines))),
            "holdings": [
                {
                    "file": f"{holding.name}.jsonl",
                    "examples": len(holding.examples),
                    "classes": self.classes.counts(holding.examples),
                }
                for holding in self.holdings
            ],
        }

    def write_into(self, folder: Path) -> None:
        """Each line as it stands in the file, and the record."""
        for holding in self.holdings:
            with (folder / f"{holding.name}.jsonl").open("wb") as file:
                file.writelines(self.lines[index].written + b"\n" for index in holding.examples)
        written = json.dumps(self.record, indent=2, ensure_ascii=False)
        (folder / RECORD).write_text(written + "\n", encoding="utf-8")


def _classes(lines: Sequence[Line], settings: PartitionSettings) -> Classes:
    if settings.by is None:
        return one_class(lines)
    classes = classes_by(settings.by, lines)
    if settings.scheme != "iid" and len(classes.names) < 2:
        raise DataError(
            f"all examples have the same `{settings.by}`, by which clients cannot differ: name another field "
            "with --by, or take --scheme iid"
        )
    return classes


def _parts(classes: Sequence[int], settings: PartitionSettings) -> partition.Parts:
    match settings:
        case PartitionSettings(
            scheme="dirichlet", clients=int(clients), alpha=float(alpha), min_examples=int(least)
        ):
            return partition.dirichlet(classes, clients, alpha, settings.seed, least)
        case PartitionSettings(scheme="shard", clients=int(clients), shards_each=int(shards)):
            return partition.shard(classes, clients, settings.seed, shards)
        case PartitionSettings(scheme="iid", clients=int(clients)):
            return partition.iid(len(classes), clients, settings.seed)
        case _:
            return partition.field(classes, settings.clients, settings.seed)
