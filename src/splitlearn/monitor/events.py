"""What happens in a cohort, as values: for the ledger, the log, and whoever else listens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, get_args


@dataclass(frozen=True, slots=True)
class MemberChanged:
    """One of a cohort's members comes or goes."""

    kind: ClassVar[str]
    member: str
    incarnation: int


class Joined(MemberChanged):
    """A member is there, for the first time or in a new incarnation."""

    kind = "joined"


class Lapsed(MemberChanged):
    """A member's lease ran out: rounds no longer wait for it."""

    kind = "lapsed"


class Returned(MemberChanged):
    """A member whose lease had run out works again."""

    kind = "returned"


class Left(MemberChanged):
    """A member has said that it goes."""

    kind = "left"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A member dropped its own gradients: they were no numbers, or an anomaly."""

    kind: ClassVar[str] = "skipped"
    member: str
    step: int


@dataclass(frozen=True, slots=True)
class Outdated:
    """A member's gradients are of a version that others have left behind."""

    kind: ClassVar[str]
    member: str
    step: int
    version: int
    staleness: int


class Dropped(Outdated):
    """A member's gradients came after their round."""

    kind = "dropped"


class Refused(Outdated):
    """A member's gradients were too old; it computes that step again."""

    kind = "refused"


@dataclass(frozen=True, slots=True)
class Kept:
    """A member's gradients wait for a later round, and it has been told so."""

    kind: ClassVar[str] = "kept"
    member: str
    step: int
    version: int


@dataclass(frozen=True, slots=True)
class Part:
    """One member's gradients in a round: computed at `version`, times `scale`.

    They were given to the cohort's aggregation with the share `coefficient`; it let so much of them through:
    1 all, 0 nothing.
    """

    member: str
    incarnation: int
    step: int
    version: int
    weight: float
    scale: float
    coefficient: float
    staleness: int
    let_through: float = 1.0


@dataclass(frozen=True, slots=True)
class RoundClosed:
    """One optimizer step of the run: whose gradients, merged in this order, and what it made of them.

    `clip_scale` is what clipping multiplied the merged gradient by, `norm` its 2-norm before.
    """

    kind: ClassVar[str] = "round"
    round: int
    version: int
    learning_rate: float
    norm: float
    clip_scale: float
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """A round could be closed, but too few members gave to it for its aggregation: it waits for more."""

    kind: ClassVar[str] = "held"
    round: int
    members: int
    least: int


Event = Joined | Lapsed | Returned | Left | Skipped | Dropped | Refused | Kept | RoundClosed | Held
Listener = Callable[[str, Event], None]
"""Is told the run's name and what happened; on the engine's thread, so it returns at once."""
KINDS: dict[str, type[Any]] = {each.kind: each for each in get_args(Event)}


def figures(event: Event) -> dict[str, Any]:
    """The event as what a line of JSON holds."""
    return {"event": event.kind, **asdict(event)}


def event_of(told: Mapping[str, Any]) -> Event:
    """What `figures` gave; raises KeyError or TypeError for anything else."""
    kind = KINDS[told["event"]]
    values = {each.name: told[each.name] for each in fields(kind)}
    if kind is RoundClosed:
        values["parts"] = tuple(Part(**part) for part in values["parts"])
    made: Event = kind(**values)
    return made
