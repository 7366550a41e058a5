"""The note in a slice's folder: which side of which split it holds, of which model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from splitlearn.errors import CheckpointError
from splitlearn.model.fingerprint import Fingerprint
from splitlearn.model.plan import SplitPlan

NOTE_FILE = "splitlearn.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class SliceNote:
    """Written by `splitlearn slice`, read when the folder is opened."""

    side: Literal["client", "trunk"]
    plan: SplitPlan
    fingerprint: Fingerprint

    def check(self, source: str, side: str, plan: SplitPlan) -> None:
        """Refuse to be taken for the other side, or for the same side of another split."""
        if side != self.side:
            raise CheckpointError(
                f"{source} holds the {self.side}'s slice of a model, not the {side}'s; "
                f"make one with: splitlearn slice MODEL --part {side}"
            )
        if plan.trunk != self.plan.trunk or plan.num_layers != self.plan.num_layers:
            raise CheckpointError(
                f"{source} is cut {self.plan} (bottom/trunk/top), asked for is {plan}; "
                "ask for its split, or slice the whole model again"
            )

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"format": _FORMAT} | asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> SliceNote:
        try:
            told = json.loads(path.read_text())
            if told["format"] != _FORMAT:
                raise ValueError(f"format {told['format']}, known is {_FORMAT}")
            plan, fingerprint = SplitPlan(**told["plan"]), Fingerprint.from_json(told["fingerprint"])
            if told["side"] not in ("client", "trunk"):
                raise ValueError(f"side {told['side']!r}")
            return cls(told["side"], plan, fingerprint)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); slice the whole model again") from None
