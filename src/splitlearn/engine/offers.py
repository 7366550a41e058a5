"""What of a cohort waits for its round, and what of it is written to the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from splitlearn.engine.contribution import Gradients
from splitlearn.engine.member import MemberRecord


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """A member's gradients of one of its steps, complete: the mean of its batch, by this `scale` already."""

    member: str
    incarnation: int
    step: int
    version: int
    weight: float
    scale: float
    learning_rate: float
    gradients: Gradients


@dataclass(frozen=True, slots=True)
class CohortSnapshot:
    """What of a cohort is written beside its run: members, gradients that were kept for later, ledger lines.

    `count` is what the ledger counted then, `offset` where in its file the lines belong.
    """

    members: tuple[MemberRecord, ...]
    kept: tuple[Offer, ...] = ()
    lines: tuple[str, ...] = ()
    count: int = 0
    offset: int = 0

    @property
    def end(self) -> int:
        """Where the ledger's file ends with these lines."""
        return self.offset + sum(len(line.encode()) + 1 for line in self.lines)


def tensors(offers: Sequence[Offer]) -> Iterator[tuple[str, Tensor]]:
    """The offers' gradients on the CPU, by names that `restored` knows."""
    for number, offer in enumerate(offers):
        for place, gradient in enumerate(offer.gradients):
            if gradient is not None:
                yield f"{number}/{place}", gradient.detach().cpu()


def told(cohort: CohortSnapshot) -> dict[str, Any]:
    """All of a snapshot but the gradients, and its lines, of which only the end is known."""
    return {
        "members": [asdict(member) for member in cohort.members],
        "kept": [_told(offer) for offer in cohort.kept],
        "ledger_bytes": cohort.end,
    }


def restored(told: dict[str, Any], gradients: Mapping[str, Tensor]) -> CohortSnapshot:
    """What `told` and `tensors` gave; raises KeyError or TypeError for anything else."""
    members = tuple(MemberRecord(**each) for each in told["members"])
    return CohortSnapshot(members, _restored(told["kept"], gradients), offset=told["ledger_bytes"])


def _told(offer: Offer) -> dict[str, Any]:
    return {
        "member": offer.member,
        "incarnation": offer.incarnation,
        "step": offer.step,
        "version": offer.version,
        "weight": offer.weight,
        "scale": offer.scale,
        "learning_rate": offer.learning_rate,
        "gradients": len(offer.gradients),
    }


def _restored(notes: Sequence[dict[str, Any]], gradients: Mapping[str, Tensor]) -> tuple[Offer, ...]:
    return tuple(
        Offer(
            **note | {"gradients": [gradients.get(f"{number}/{place}") for place in range(note["gradients"])]}
        )
        for number, note in enumerate(notes)
    )
