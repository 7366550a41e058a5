"""One client's part in a run: its incarnation, its numbered steps, and whether it is there."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from splitlearn.engine.contribution import Contribution
from splitlearn.engine.trunk_state import AdapterVersion
from splitlearn.errors import AccessDenied, RunLost, StepOutOfOrder
from splitlearn.vocabulary import Fate, Merged, Phase, StepKey, Versions
from splitlearn.wire.messages import AnswerMessage, MemberFacts

if TYPE_CHECKING:
    from splitlearn.engine.run import Run

NUMBER_BITS = 48


class State(Enum):
    """Whether a round waits for a member."""

    ACTIVE = "active"
    LAPSED = "lapsed"
    LEFT = "left"


class Event(Enum):
    """What happens to a member."""

    JOIN = "join"
    WORK = "work"
    LAPSE = "lapse"
    LEAVE = "leave"


NEXT = {
    (State.ACTIVE, Event.JOIN): State.ACTIVE,
    (State.ACTIVE, Event.WORK): State.ACTIVE,
    (State.ACTIVE, Event.LAPSE): State.LAPSED,
    (State.ACTIVE, Event.LEAVE): State.LEFT,
    (State.LAPSED, Event.JOIN): State.ACTIVE,
    (State.LAPSED, Event.WORK): State.ACTIVE,
    (State.LAPSED, Event.LEAVE): State.LEFT,
    (State.LEFT, Event.JOIN): State.ACTIVE,
}
"""A member whose lease ran out is back as soon as it works; one that has left joins again first."""


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """A member as it is written to the disk; `key` is a digest of its client's id."""

    name: str
    key: str
    incarnation: int
    state: str
    step: int
    fate: str = ""
    """What became of that step's gradients; empty where it was skipped."""
    round: int = 0
    staleness: int = 0
    members: int = 0


class Member:
    """Belongs to the engine's thread. `step` of its steps are done, skipped ones included.

    Its number, which is in the key of each of its steps, is another one whenever the run is opened or
    restored from the disk: what was sent before is turned away.
    """

    def __init__(self, run: Run, name: str, key: str) -> None:
        self.run, self.name, self.key = run, name, key
        self.number = secrets.randbits(NUMBER_BITS) | 1
        self.incarnation = 1
        self.state = State.ACTIVE
        self.lease_until = 0.0
        self.step = 0
        self.contribution = Contribution(len(run.trunk_names))
        self.base: AdapterVersion | None = None
        """What all forwards of the step that is underway use; None before its first one."""
        self.given: AdapterVersion | None = None
        """Whose ends it was last given, where the run trains them: its next step is computed with that."""
        self.began_at = 0.0
        self.last: AnswerMessage | None = None
        """The answer to its last step that was done."""
        self.settled_at = 0
        """What the ledger counted when that was."""

    @property
    def next_step(self) -> int:
        return self.step + 1

    def belongs_to(self, client: bytes) -> bool:
        """Whether it is this client; a private run's owner is whoever joined it last."""
        if self.run.cohort is None:
            return self.run.belongs_to(client)
        return hmac.compare_digest(self.key, key_of(client))

    def advance(self, event: Event) -> bool:
        """Whether that changed its state; raises RunLost where it is not possible."""
        try:
            after = NEXT[self.state, event]
        except KeyError:
            raise RunLost(
                f"member {self.name} has left run {self.run.name}: join it again to go on"
            ) from None
        changed, self.state = after is not self.state, after
        return changed

    def require_key(self, client: bytes) -> None:
        """Raises AccessDenied where another client has this name."""
        if not self.belongs_to(client):
            raise AccessDenied(
                f"run {self.run.name} has a member {self.name} with another key: give the key file that it "
                "joined with (member_key=, --member-key), or take another member name"
            )

    def rejoin(self) -> None:
        """A newer incarnation takes over: what the older one half accumulated is discarded."""
        self.incarnation += 1
        self.forget()

    def pin(self) -> AdapterVersion:
        """The adapter that the step underway is computed with, from its first forward on."""
        if self.base is None:
            self.base, self.began_at = self.given or self.run.current, time.monotonic()
        return self.base

    def fits(self, ends_version: int | None) -> bool:
        """Whether a step may be computed with these ends: they are the version's that it is pinned at."""
        pinned = self.base or self.given
        return pinned is not None and pinned.number == ends_version

    def is_repeating(self, step: int) -> bool:
        """Whether a cohort's member, back from its own checkpoint, computes a step that counts already."""
        return self.run.cohort is not None and step <= self.step

    def require_next(self, step: int) -> None:
        """Raises StepOutOfOrder where a step is not the one that comes next."""
        if step != self.next_step:
            raise StepOutOfOrder(
                f"step {step} of run {self.run.name} cannot be done: the next is step {self.next_step}",
                facts={"current_step": self.next_step, "current_version": self.run.version},
            )

    def kept_step(self, step: int) -> AnswerMessage | None:
        """The answer to an optimizer step that was done already; None where it is the next one.

        Raises:
            StepOutOfOrder: it is neither.
        """
        last = self.last
        if step == self.step and last is not None and last.key.step == step:
            return last
        self.require_next(step)
        return None

    def key_now(self, incarnation: int) -> StepKey:
        """What names it, as this incarnation of it would."""
        return StepKey(run=self.number, incarnation=incarnation)

    def step_key(self, step: int) -> StepKey:
        return StepKey(run=self.number, incarnation=self.incarnation, step=step, phase=Phase.OPTIMIZER_STEP)

    def settle(self, step: int, merged: Merged | None, count: int) -> None:
        """The step is done, and what became of it is in the ledger up to `count`; None: it was skipped."""
        self.forget_gradients()
        self.step, self.settled_at = step, count
        self.last = AnswerMessage(
            self.step_key(step),
            versions=Versions(self.run.name, self.run.version),
            stepped=merged is not None and merged.fate is not Fate.DROPPED,
            merged=merged,
        )

    def forget(self) -> None:
        """It is gone, or another: what it has half accumulated, and which ends it has."""
        self.forget_gradients()
        self.given = None

    def forget_gradients(self) -> None:
        self.contribution.forget()
        self.base = None

    def facts(self, now: float) -> MemberFacts:
        return MemberFacts(
            self.name,
            self.state.value,
            self.incarnation,
            self.step,
            max(self.lease_until - now, 0.0) if self.state is State.ACTIVE else 0.0,
            self.last.merged if self.last is not None else None,
            self.base.number if self.base is not None else None,
        )

    def record(self) -> MemberRecord:
        record = MemberRecord(self.name, self.key, self.incarnation, self.state.value, self.step)
        if self.last is None or (merged := self.last.merged) is None:
            return record
        return replace(
            record,
            fate=merged.fate.name,
            round=merged.round,
            staleness=merged.staleness,
            members=merged.members,
        )

    @classmethod
    def restored(cls, run: Run, record: MemberRecord) -> Member:
        """As it was written; what it had half accumulated is gone."""
        member = cls(run, record.name, record.key)
        member.incarnation, member.step = record.incarnation, record.step
        member.state = State(record.state)
        merged = None
        if record.fate:
            merged = Merged(Fate[record.fate], record.round, record.staleness, record.members)
        if record.step:
            member.settle(record.step, merged, 0)
        return member


def key_of(client: bytes) -> str:
    """What is kept of a client's id, which is its secret."""
    return hashlib.sha256(client).hexdigest()
