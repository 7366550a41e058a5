"""What a client's process tells the one that simulates, as values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Activity(Enum):
    """What a client does now."""

    NOT_BEGUN = "not begun"
    STARTING = "starting"
    MEASURING = "measuring"
    COMPUTING = "computing"
    SLEEPING = "sleeping"
    GIVING = "giving"
    TRAINED = "trained"
    DONE = "done"
    KILLED = "killed"


@dataclass(frozen=True, slots=True)
class Does:
    """It has begun with something else."""

    activity: Activity


@dataclass(frozen=True, slots=True)
class Stepped:
    """One of its optimizer steps is done: of so many tokens, in so many seconds, waiting included.

    `staleness` counts the versions that its gradients were old; None where they were skipped, or were
    given before the client was begun again.
    """

    step: int
    tokens: int
    seconds: float
    staleness: int | None


@dataclass(frozen=True, slots=True)
class Lost:
    """The mean loss of its newest steps, in nats a token."""

    loss: float


@dataclass(frozen=True, slots=True)
class Ended:
    """Its adapter is written; losses are those on what is held out."""

    steps: int
    held_out_loss_before: float | None
    held_out_loss: float | None


@dataclass(frozen=True, slots=True)
class Failed:
    """It ends with this error."""

    message: str


Report = Does | Stepped | Lost | Ended | Failed
