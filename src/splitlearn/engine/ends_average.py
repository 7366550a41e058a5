"""An average of the members' ends, as they are told it, and as one file on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from splitlearn.disk import make_folder, sync
from splitlearn.errors import CheckpointError
from splitlearn.model.thin import Thin
from splitlearn.wire.messages import AveragedEnds

FILE = "average.safetensors"
NOTE = "average"
WEIGHT, NEW, ALL = "weight/", "new/", "all/"
HEADER_BYTES = 256
"""More than a tensor's entry takes in the file."""
UP, DOWN = "/up", "/down"


@dataclass(frozen=True, slots=True, eq=False)
class EndsAverage:
    """Average `number` of a run, made of the ends of so many members; the next is due at version `due`.

    `residual` is what a module's base got with this one, `residuals` all that it ever got. `frozen` is the
    digest of what no member trains.
    """

    number: int
    due: int
    members: int
    aggregation_residual: float
    frozen: int
    weights: Mapping[str, Tensor]
    residual: Mapping[str, Thin] = field(default_factory=dict)
    residuals: Mapping[str, Thin] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        thin = [*self.residual.values(), *self.residuals.values()]
        return sum(each.nbytes for each in self.weights.values()) + sum(each.nbytes for each in thin)

    @property
    def file_bytes(self) -> int:
        """At least what its file will take."""
        return self.nbytes + HEADER_BYTES * (len(self.weights) + 4 * len(self.residuals) + 1)

    def since(self, number: int) -> AveragedEnds:
        """As a member is told it that has this average."""
        is_next = number == self.number - 1
        residual = self.residual if is_next else self.residuals
        factors = {module: (each.up_OR, each.down_RI) for module, each in residual.items()}
        return AveragedEnds(
            self.number,
            self.due,
            self.members,
            self.aggregation_residual,
            self.weights,
            factors,
            since_start=not is_next,
        )

    def write(self, folder: Path) -> None:
        """In place of the one before; on the disk when this returns.

        Raises:
            CheckpointError: it cannot be; the one before is still there.
        """
        note = {
            name: getattr(self, name)
            for name in ("number", "due", "members", "aggregation_residual", "frozen")
        }
        unfinished = folder / f"{FILE}.new"
        try:
            if not folder.exists():
                make_folder(folder)
            save_file(self._tensors(), unfinished, {NOTE: json.dumps(note)})
            sync(unfinished)
            os.replace(unfinished, folder / FILE)
            sync(folder)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"average {self.number} of the members' ends could not be kept ({error}): make room in the "
                "server's --state-dir; they ask for it again by themselves"
            ) from None

    @classmethod
    def read(cls, folder: Path) -> EndsAverage | None:
        """The newest one; None where none was written.

        Raises:
            CheckpointError: it is torn.
        """
        if not (folder / FILE).is_file():
            return None
        try:
            with safe_open(folder / FILE, "pt") as file:
                note = json.loads(file.metadata()[NOTE])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            weights = {
                name.removeprefix(WEIGHT): each for name, each in tensors.items() if name.startswith(WEIGHT)
            }
            return cls(**note, weights=weights, residual=_thin(tensors, NEW), residuals=_thin(tensors, ALL))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            raise CheckpointError(
                f"{folder / FILE} is torn or was changed: members cannot be given the average of their ends. "
                "Take it away, and have them begin anew under another run name"
            ) from None

    def _tensors(self) -> dict[str, Tensor]:
        named = {WEIGHT + name: each.contiguous() for name, each in self.weights.items()}
        for kind, thin in ((NEW, self.residual), (ALL, self.residuals)):
            for module, each in thin.items():
                # Of the first average both are the same, which the file's format does not allow.
                named[kind + module + UP] = each.up_OR.clone()
                named[kind + module + DOWN] = each.down_RI.clone()
        return named


def _thin(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Thin]:
    modules = [name[len(kind) : -len(UP)] for name in tensors if name.startswith(kind) and name.endswith(UP)]
    return {each: Thin(tensors[kind + each + UP], tensors[kind + each + DOWN]) for each in modules}
