"""A step whose turn has come: it is the next of its session, or its run is here."""

from __future__ import annotations

from dataclasses import dataclass

from splitlearn.engine.run import Run
from splitlearn.engine.session import Session
from splitlearn.engine.step import Step
from splitlearn.wire.messages import RunStepMessage, StepMessage


@dataclass(frozen=True, slots=True, eq=False)
class ReadyStep:
    """`session` is None for a lone forward without a cache."""

    step: Step[StepMessage]
    session: Session | None


@dataclass(frozen=True, slots=True, eq=False)
class ReadyRunStep:
    """Runs alone: gradients of several runs have nothing to share but the base."""

    step: Step[RunStepMessage]
    run: Run
