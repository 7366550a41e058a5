"""A step that waits for its turn: it is the next of its session, or its run is here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from splitlearn.engine.member import Member
from splitlearn.engine.session import Session
from splitlearn.engine.step import DECODE_TOKENS, Step
from splitlearn.wire.messages import RunStepMessage, StepMessage

# B rows   T new tokens   D hidden


class Work(Enum):
    """Kinds of work that take turns."""

    DECODE = "decode"
    PREFILL = "prefill"
    TRAINING = "training"


class Ready(Protocol):
    """What the order of waiting steps depends on."""

    @property
    def step(self) -> Step[Any]: ...
    @property
    def work(self) -> Work: ...
    @property
    def urgency(self) -> tuple[float, float]:
        """Its deadline and when it came: less goes first, among those whose turn it is alike."""


@dataclass(slots=True, eq=False)
class ReadyStep:
    """Run in pieces of at most `chunk_tokens` new tokens a row; 0 runs it whole.

    `session` is None for a lone forward without a cache. `done` of the step's tokens have run,
    `parts` are their activations; the session's own length moves with the last piece only.
    """

    step: Step[StepMessage]
    session: Session | None
    chunk_tokens: int = 0
    done: int = 0
    parts: list[Tensor] = field(default_factory=list)
    queued_us: int = 0
    device_us: int = 0
    pause_s: float | None = None
    """How long after its session's last answer it came, where that was lately."""

    @property
    def work(self) -> Work:
        few = min(DECODE_TOKENS, self.chunk_tokens or DECODE_TOKENS)
        is_decode = self.session is not None and self.step.message.tokens <= few
        return Work.DECODE if is_decode else Work.PREFILL

    @property
    def urgency(self) -> tuple[float, float]:
        return self.step.deadline, self.step.arrived_at

    @property
    def rows(self) -> int:
        return self.step.message.rows

    @property
    def tokens(self) -> int:
        """New tokens a row of the piece that runs next."""
        left = self.step.message.tokens - self.done
        return min(left, self.chunk_tokens or left)

    @property
    def length(self) -> int:
        """Tokens that the session's rows hold already, those of earlier pieces included."""
        return self.done if self.session is None else self.session.length + self.done

    @property
    def is_underway(self) -> bool:
        return self.done > 0

    @property
    def is_done(self) -> bool:
        return self.done == self.step.message.tokens

    def piece_of(self, tensor: Tensor) -> Tensor:
        """What the next piece needs of something that has a column for each of the step's tokens."""
        if self.tokens == tensor.shape[1]:
            return tensor
        return tensor[:, self.done : self.done + self.tokens]

    def take(self, part_BTD: Tensor, device_us: int) -> None:
        """The next piece has run."""
        self.parts.append(part_BTD)
        self.done += part_BTD.shape[1]
        self.device_us += device_us

    def joined(self) -> Tensor:
        """The whole step's activation, once all its pieces have run."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, 1)


@dataclass(frozen=True, slots=True, eq=False)
class ReadyRunStep:
    """Runs alone: gradients of several runs have nothing to share but the base."""

    step: Step[RunStepMessage]
    member: Member
    work: ClassVar[Work] = Work.TRAINING

    @property
    def urgency(self) -> tuple[float, float]:
        """By age alone: a run's steps keep their order."""
        return math.inf, self.step.arrived_at
