"""The members of one run, and the rounds that they make: who is waited for, whose gradients count."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from splitlearn.config import GIB
from splitlearn.engine import round as rounds
from splitlearn.engine import shared_ends
from splitlearn.engine.aggregations import aggregation_of
from splitlearn.engine.contribution import Gradients
from splitlearn.engine.ends import Awaited
from splitlearn.engine.failures import explained
from splitlearn.engine.ledger import Ledger
from splitlearn.engine.member import Member, State
from splitlearn.engine.merge import is_finite
from splitlearn.engine.offers import CohortSnapshot, Offer
from splitlearn.engine.parking import Parking
from splitlearn.engine.roster import Roster
from splitlearn.engine.rules import OpenRound, rule_of
from splitlearn.engine.underway import Underway
from splitlearn.errors import MessageError, RunBroken, SplitLearnError
from splitlearn.monitor import events
from splitlearn.vocabulary import Fate, Merged, Versions
from splitlearn.wire.messages import AnswerMessage, OptimizerStep, RunStepMessage

if TYPE_CHECKING:
    from splitlearn.engine.run import Run
    from splitlearn.engine.step import Step


class Cohort(Roster):
    """Belongs to the engine's thread.

    What a member is told of an optimizer step is on the disk before: it is never taken back.

    Args:
        run: whose optimizer the rounds step.
        lease_s: how long a member is waited for that neither works nor says that it is there.
        changed: told when there is something for the disk; without it nothing is kept there.
        max_ends_bytes: what bottom's and top's adapters may take, where the run trains them.
    """

    def __init__(
        self,
        run: Run,
        lease_s: float,
        changed: Callable[[], None] | None = None,
        listener: events.Listener | None = None,
        max_ends_bytes: int = GIB,
    ) -> None:
        super().__init__(run, lease_s, Ledger(run.name, listener))
        self._settings = run.settings.cohort
        self._rule = rule_of(self._settings)
        self._least = aggregation_of(self._settings).least
        self._held = 0
        self._changed = changed
        self._waiting: list[Offer] = []
        self._open_since = 0.0
        self._parking = Parking()
        self._max_ends_bytes = max_ends_bytes
        self.underway = Underway(run, self._rule, self.ledger)

    def join(self, client: bytes, name: str) -> Member:
        is_back = name in self.members
        member = super().join(client, name)
        if is_back and self._rule.waits:
            self._waiting = [each for each in self._waiting if each.member != name]
        return member

    def leave(self, member: Member) -> None:
        super().leave(member)
        self._go_on()

    def awaited_for_ends(self) -> Awaited:
        """Whom an average of ends waits for: nobody whose round waits for those who wait for the average."""
        waiting = {each.member for each in self._waiting} if self._rule.waits else set()
        is_complete = len(self.members) >= self._settings.members
        return Awaited(frozenset(self.active() - waiting), is_complete, self._run.version)

    def end(self, error: SplitLearnError) -> None:
        """Nobody waits any more."""
        self._parking.fail(error, lambda member, step: True)

    # ---------------------------------------------------------------- steps

    def tell_ends(self, member: Member, asked: RunStepMessage) -> AnswerMessage:
        """The ends as they are now, which its next step is computed with; a step underway begins anew.

        Whoever comes first brings them: until then there are none in the answer.

        Raises:
            MessageError: the run does not train them, or what is brought cannot be trained.
            ResourceExhausted: they are larger than any adapter may be, or than the client's quota.
        """
        run = self._run
        if not run.settings.share.is_sync:
            raise MessageError(f"run {run.name} leaves bottoms and tops to its members: it has none")
        if asked.ends and not run.current.ends:
            run.take_ends(shared_ends.first(asked.ends, run.masters, self._max_ends_bytes))
        member.forget_gradients()
        return self._with_ends(member, AnswerMessage(asked.key))

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
            self._begin(member, asked.optimizer, asked.ends)
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
        self._lapse(now)
        self._go_on()
        self._parking.fail_late(now, self._what_is_missing)

    def allow(self, seconds: float) -> None:
        """For so long nobody was heard, because the server itself did not listen: it counts for nobody."""
        for member in self:
            member.lease_until += seconds
        self._open_since += seconds

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

    def _begin(self, member: Member, asked: OptimizerStep, ends: Mapping[str, Tensor]) -> None:
        step = member.next_step
        if asked.skip:
            self._settle(member, step, events.Skipped(member.name, step), None)
            return
        if member.contribution.is_empty or member.base is None:
            raise self.underway.lost(member)
        version, staleness = member.base.number, self._run.version - member.base.number
        late = Merged(Fate.DROPPED, self._run.step, staleness)
        if staleness and self._rule.drops_late:
            self._settle(member, step, events.Dropped(member.name, step, version, staleness), late)
            return
        self.underway.require_not_stale(member, staleness)
        mean = [
            *member.contribution.scaled(asked.gradient_scale),
            *shared_ends.gradients(ends, self._run.current.ends, asked.gradient_scale),
        ]
        if not is_finite(mean):
            self._settle(member, step, events.Skipped(member.name, step), late)
            return
        self._offer(member, version, asked, mean)
        if not self._rule.waits:
            kept = Merged(Fate.KEPT, self._run.step, staleness)
            self._settle(member, step, events.Kept(member.name, step, version), kept)

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
        while self._waiting and self._may_close(self._open_round):
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

    def _may_close(self, open: OpenRound) -> bool:
        if not self._rule.closes(open):
            return False
        if (members := len(open.arrived)) >= self._least:
            return True
        if self._held != (round := self._run.step + 1):
            self._held = round
            self.ledger.add(events.Held(round, members, self._least))
        return False

    def _settle(self, member: Member, step: int, event: events.Event | None, merged: Merged | None) -> None:
        if event is not None:
            self.ledger.add(event)
        member.settle(step, merged, self.ledger.count)

    def _answer(self, member: Member, step: int) -> AnswerMessage | None:
        """None while it is not done, or not on the disk."""
        if member.step != step or member.last is None or self.ledger.kept < member.settled_at:
            return None
        return self._with_ends(member, replace(member.last, key=member.step_key(step)))

    def _answer_to_old(self, member: Member, step: int) -> AnswerMessage:
        versions = Versions(self._run.name, self._run.version)
        answer = AnswerMessage(
            member.step_key(step), versions=versions, stepped=True, merged=Merged(Fate.MERGED)
        )
        return self._with_ends(member, answer)

    def _with_ends(self, member: Member, answer: AnswerMessage) -> AnswerMessage:
        """With bottom's and top's adapters as they are now, where the run trains them."""
        current = self._run.current
        if not current.ends:
            return answer
        member.given = current
        versions = Versions(self._run.name, current.number)
        # These tensors never change: the next version has its own.
        return replace(
            answer, versions=versions, ends={name: each.detach() for name, each in current.ends.items()}
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

    def _what_is_missing(self) -> str:
        open = self._open_round
        whom = ", ".join(sorted(set(open.awaited) - set(open.arrived)))
        until = "" if open.is_complete else f" until {self._settings.members} members have joined"
        if open.is_complete and len(open.arrived) < self._least:
            until = f" until {self._least} members have given, which {self._settings.aggregation} needs"
        return (
            f"round {self._run.step + 1} of run {self._run.name} still waits"
            f"{' for ' * bool(whom)}{whom}{until}: ask again"
        )
