"""The members of one run, and the rounds that they make: who is waited for, whose gradients count."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from splitlearn.engine import round as rounds
from splitlearn.engine.contribution import Gradients
from splitlearn.engine.ends import Awaited
from splitlearn.engine.failures import explained
from splitlearn.engine.ledger import Ledger
from splitlearn.engine.member import Event, Member, State, key_of
from splitlearn.engine.merge import is_finite
from splitlearn.engine.offers import CohortSnapshot, Offer
from splitlearn.engine.parking import Parking
from splitlearn.engine.rules import OpenRound, rule_of
from splitlearn.engine.trunk_state import AdapterVersion
from splitlearn.errors import ContributionLost, MessageError, RunBroken, SplitLearnError, StaleGradient
from splitlearn.monitor import events
from splitlearn.vocabulary import Fate, Merged, Versions
from splitlearn.wire.messages import AnswerMessage, OptimizerStep, RunStepMessage

if TYPE_CHECKING:
    from splitlearn.engine.run import Run
    from splitlearn.engine.step import Step


class Cohort:
    """Belongs to the engine's thread.

    What a member is told of an optimizer step is on the disk before: it is never taken back.

    Args:
        run: whose optimizer the rounds step.
        lease_s: how long a member is waited for that neither works nor says that it is there.
        changed: told when there is something for the disk; without it nothing is kept there.
    """

    def __init__(
        self,
        run: Run,
        lease_s: float,
        changed: Callable[[], None] | None = None,
        listener: events.Listener | None = None,
    ) -> None:
        self.members: dict[str, Member] = {}
        self.ledger = Ledger(run.name, listener)
        self._run, self._settings = run, run.settings.cohort
        self._rule = rule_of(self._settings)
        self._lease_s = lease_s
        self._changed = changed
        self._waiting: list[Offer] = []
        self._open_since = 0.0
        self._parking = Parking()

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members.values())

    # ---------------------------------------------------------------- members

    def join(self, client: bytes, name: str) -> Member:
        """The member of this name, new or in a new incarnation.

        Raises:
            AccessDenied: another client has the name; MessageError: this client has another name, or none.
        """
        self._require_name(client, name)
        if (member := self.members.get(name)) is None:
            member = self.members[name] = Member(self._run, name, key_of(client))
        else:
            member.require_key(client)
            member.advance(Event.JOIN)
            member.rejoin()
            if self._rule.waits:
                self._waiting = [each for each in self._waiting if each.member != name]
        member.lease_until = time.monotonic() + self._lease_s
        self.ledger.add(events.Joined(name, member.incarnation))
        return member

    def of(self, client: bytes) -> Member | None:
        """The member that this client is."""
        key = key_of(client)
        return next((member for member in self if member.key == key), None)

    def renew(self, member: Member) -> None:
        """It works, or says that it is there; raises RunLost where it has left."""
        if member.advance(Event.WORK):
            self.ledger.add(events.Returned(member.name, member.incarnation))
        member.lease_until = time.monotonic() + self._lease_s

    def leave(self, member: Member) -> None:
        """Rounds no longer wait for it; what it has given to the open one counts."""
        member.advance(Event.LEAVE)
        member.forget_gradients()
        self.ledger.add(events.Left(member.name, member.incarnation))
        self._go_on()

    def active(self) -> set[str]:
        """The names of those that rounds wait for."""
        return {member.name for member in self if member.state is State.ACTIVE}

    def awaited_for_ends(self) -> Awaited:
        """Whom an average of ends waits for: nobody whose round waits for those who wait for the average."""
        waiting = {each.member for each in self._waiting} if self._rule.waits else set()
        is_complete = len(self.members) >= self._settings.members
        return Awaited(frozenset(self.active() - waiting), is_complete, self._run.version)

    def end(self, error: SplitLearnError) -> None:
        """Nobody waits any more."""
        self._parking.fail(error, lambda member, step: True)

    # ---------------------------------------------------------------- steps

    def pinned(self, member: Member, microbatch: int) -> AdapterVersion:
        """What a step's forward is computed with: what its first one was.

        Raises:
            StaleGradient: it would be refused in the end; ContributionLost: what came before it is gone.
        """
        self.require_fresh(member)
        if member.base is None and microbatch:
            raise self._lost(member)
        return member.pin()

    def require_fresh(self, member: Member) -> None:
        """Before more is computed for a step: raises StaleGradient where it would be refused in the end."""
        if member.base is not None and not self._rule.drops_late:
            self._require_fresh(member, self._run.version - member.base.number)

    def require_underway(self, member: Member, adapter: AdapterVersion) -> None:
        """Before a gradient is added: the step was begun with this version, and would not be refused.

        Raises:
            StaleGradient: as `require_fresh`; ContributionLost: the step has begun anew since its forward.
        """
        self.require_fresh(member)
        if member.base is not adapter:
            raise self._lost(member)

    def take(self, member: Member, asked: RunStepMessage) -> AnswerMessage | None:
        """A member's optimizer step: its gradients become part of a round.

        A step before the last one, which a member repeats that has come back, is answered as done.

        Returns:
            The answer; None where it waits for the round, or for the disk: `park` it then.

        Raises:
            StaleGradient: the gradients are too old; ContributionLost: there are none.
            StepOutOfOrder: the step is later than the next one.
        """
        step = asked.key.step
        if step < member.step:
            return self._answer_to_old(member, step)
        if step == member.next_step and not self._is_offered(member, step):
            if asked.optimizer is None:
                raise MessageError(
                    "an optimizer step says by what to scale the gradients, and its learning rate"
                )
            self._begin(member, asked.optimizer)
        elif step > member.next_step:
            member.require_next(step)
        self._go_on()
        return self._answer(member, step)

    def park(self, member: Member, step: Step[Any]) -> None:
        self._parking.park(member, step)

    # ---------------------------------------------------------------- time

    @property
    def due_at(self) -> float:
        """When something is due though nobody asks for anything."""
        leases = (each.lease_until for each in self if each.state is State.ACTIVE)
        closes = self._open_since + self._rule.closes_at_s(self._open_round) if self._waiting else math.inf
        return min(*leases, self._parking.due_at, closes, math.inf)

    def tick(self, now: float) -> None:
        """Let leases run out, close a round whose time is up, and have clients ask again that waited long."""
        for member in self:
            if member.state is State.ACTIVE and member.lease_until <= now:
                member.advance(Event.LAPSE)
                member.forget_gradients()
                self.ledger.add(events.Lapsed(member.name, member.incarnation))
        self._go_on()
        self._parking.fail_late(now, self._what_is_missing)

    # ---------------------------------------------------------------- on the disk

    def snapshot(self) -> CohortSnapshot:
        # Whoever waits for its round has not been answered: it would offer again.
        kept = () if self._rule.waits else tuple(self._waiting)
        members = tuple(member.record() for member in self)
        ledger = self.ledger
        return CohortSnapshot(members, kept, ledger.tail(), ledger.count, ledger.offset)

    def restore(self, snapshot: CohortSnapshot) -> None:
        """Members as they were, their leases new; who half accumulated something computes it again."""
        now = time.monotonic()
        for record in snapshot.members:
            member = self.members[record.name] = Member.restored(self._run, record)
            member.lease_until = now + self._lease_s
        self._waiting, self._open_since = list(snapshot.kept), now
        self.ledger.offset = snapshot.end

    def kept(self, count: int, offset: int = 0) -> None:
        """So many of the ledger's events are on the disk: who waited for that is answered."""
        self.ledger.keep(count, offset)
        self._parking.answer(self._answer)

    def not_kept(self, error: Exception) -> None:
        """The disk failed: who waits for it is told. What was done stays done, and is tried again."""
        self._parking.fail(explained(error), lambda member, step: step.message.key.step == member.step)

    # ---------------------------------------------------------------- one step

    def _require_name(self, client: bytes, name: str) -> None:
        if not name:
            raise MessageError(f"run {self._run.name} has members: say which one this is (member=, --member)")
        if (own := self.of(client)) is not None and own.name != name:
            raise MessageError(f"this client is member {own.name} of run {self._run.name}: give that name")

    def _begin(self, member: Member, asked: OptimizerStep) -> None:
        step = member.next_step
        if asked.skip:
            self._settle(member, step, events.Skipped(member.name, step), None)
            return
        if member.contribution.is_empty or member.base is None:
            raise self._lost(member)
        version, staleness = member.base.number, self._run.version - member.base.number
        late = Merged(Fate.DROPPED, self._run.step, staleness)
        if staleness and self._rule.drops_late:
            self._settle(member, step, events.Dropped(member.name, step, version, staleness), late)
            return
        self._require_fresh(member, staleness)
        mean = member.contribution.scaled(asked.gradient_scale)
        if not is_finite(mean):
            self._settle(member, step, events.Skipped(member.name, step), late)
            return
        self._offer(member, version, asked, mean)
        if not self._rule.waits:
            kept = Merged(Fate.KEPT, self._run.step, staleness)
            self._settle(member, step, events.Kept(member.name, step, version), kept)

    def _lost(self, member: Member) -> ContributionLost:
        # All of it: the step is computed at one version.
        member.forget_gradients()
        return ContributionLost(
            f"step {member.next_step} of member {member.name} has no gradients here (the run was restored, "
            "or the member's lease had run out): compute it again",
            facts={"current_step": member.next_step},
        )

    def _offer(self, member: Member, version: int, asked: OptimizerStep, mean: Gradients) -> None:
        if not self._waiting:
            self._open_since = time.monotonic()
        self._waiting.append(
            Offer(
                member.name,
                member.incarnation,
                member.next_step,
                version,
                asked.weight,
                asked.gradient_scale,
                asked.learning_rate,
                mean,
            )
        )
        member.forget_gradients()

    def _go_on(self) -> None:
        """Close what can be closed, and have what is new kept."""
        while self._waiting and self._rule.closes(self._open_round):
            waiting, self._waiting = self._waiting, []
            try:
                closed = rounds.close(self._run, waiting)
            except RunBroken as error:
                self._parking.fail(error, lambda member, step: True)
                raise
            self.ledger.add(closed)
            if self._rule.waits:
                for part in closed.parts:
                    merged = Merged(Fate.MERGED, closed.round, part.staleness, len(closed.parts))
                    self._settle(self.members[part.member], part.step, None, merged)
        if self._changed is None:
            self.kept(self.ledger.count)
        elif self.ledger.kept < self.ledger.count:
            self._changed()

    def _settle(self, member: Member, step: int, event: events.Event | None, merged: Merged | None) -> None:
        if event is not None:
            self.ledger.add(event)
        member.settle(step, merged, self.ledger.count)

    def _answer(self, member: Member, step: int) -> AnswerMessage | None:
        """None while it is not done, or not on the disk."""
        if member.step != step or member.last is None or self.ledger.kept < member.settled_at:
            return None
        return replace(member.last, key=member.step_key(step))

    def _answer_to_old(self, member: Member, step: int) -> AnswerMessage:
        versions = Versions(self._run.name, self._run.version)
        return AnswerMessage(
            member.step_key(step), versions=versions, stepped=True, merged=Merged(Fate.MERGED)
        )

    def _is_offered(self, member: Member, step: int) -> bool:
        return any(each.member == member.name and each.step == step for each in self._waiting)

    @property
    def _open_round(self) -> OpenRound:
        return OpenRound(
            tuple(each.member for each in self._waiting),
            self.active(),
            time.monotonic() - self._open_since,
            self._run.step > 0 or len(self.members) >= self._settings.members,
        )

    def _require_fresh(self, member: Member, staleness: int) -> None:
        assert member.base is not None
        age_s, limit_s = time.monotonic() - member.began_at, self._settings.age_limit_s
        limit = self._rule.staleness_limit
        if staleness <= limit and (not limit_s or age_s <= limit_s):
            return
        version = member.base.number
        member.forget_gradients()
        self.ledger.add(events.Refused(member.name, member.next_step, version, staleness))
        allowed = f"{limit} versions" + (f" and {limit_s:g} s" if limit_s else "")
        raise StaleGradient(
            f"the gradients of member {member.name} are {staleness} versions and {age_s:.0f} s old, run "
            f"{self._run.name} allows {allowed}: compute them again",
            facts={"current_version": self._run.version, "staleness": staleness, "age_s": age_s},
        )

    def _what_is_missing(self) -> str:
        open = self._open_round
        whom = ", ".join(sorted(set(open.awaited) - set(open.arrived)))
        until = "" if open.is_complete else f" until {self._settings.members} members have joined"
        return (
            f"round {self._run.step + 1} of run {self._run.name} still waits"
            f"{' for ' * bool(whom)}{whom}{until}: ask again"
        )
