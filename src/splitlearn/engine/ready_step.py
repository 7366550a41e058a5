"""A step whose turn has come: it is the next of its session, and it fits."""

from __future__ import annotations

from dataclasses import dataclass

from splitlearn.engine.session import Session
from splitlearn.engine.step import Step


@dataclass(frozen=True, slots=True, eq=False)
class ReadyStep:
    """`session` is None for a lone forward without a cache."""

    step: Step
    session: Session | None
