"""A cohort's member: waits for its rounds, and comes back by itself where the server was gone."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from itertools import chain, repeat
from typing import NoReturn, TypeVar

from torch import Tensor

from splitlearn.client.heartbeat import BEATS_A_LEASE, Heartbeat
from splitlearn.client.run import ClientRun
from splitlearn.client.shared_ends import SharedEnds
from splitlearn.client.transport import Transport
from splitlearn.config import ClientConfig
from splitlearn.errors import (
    CheckpointError,
    ContributionLost,
    RoundUnfinished,
    RunLost,
    RunTakenOver,
    SplitLearnError,
    StaleGradient,
    StepTimeout,
    TapeExpired,
    TrunkUnreachable,
    UnsupportedCall,
)
from splitlearn.vocabulary import Merged, Phase, RunSettings, StepKey
from splitlearn.wire.messages import (
    AnswerMessage,
    AveragedEnds,
    GivenEnds,
    OptimizerStep,
    RunFacts,
    RunStepMessage,
)

PAUSES_S = (0.1, 0.2, 0.5, 1.0, 2.0)
ENDS_TRIES = 5
GONE = (TrunkUnreachable, StepTimeout)
Answered = TypeVar("Answered")
log = logging.getLogger("splitlearn")


class Rejoined(Exception):
    """The server had lost the run and has it again, as it last kept it: what was asked is asked anew."""


class MemberRun(ClientRun):
    """`step` counts this member's own optimizer steps; the run's are rounds, which it makes with others.

    Where the trunk no longer has what a step had added up to, or it is too old, the step's microbatches are
    to be computed again: `ContributionLost` or `StaleGradient` says so, and the step begins anew.
    """

    def __init__(
        self,
        transport: Transport,
        facts: RunFacts,
        settings: RunSettings,
        config: ClientConfig,
        ends: SharedEnds | None = None,
    ) -> None:
        super().__init__(transport, facts, settings, config.train_s)
        self._config = config
        assert facts.own is not None
        self.step, self.lease_s = facts.own.step, facts.own.lease_left_s
        self._done_there = facts.own.step
        self.last_merged: Merged | None = None
        self._ends = ends
        self._heartbeat = Heartbeat(self, self.lease_s)

    def go_on_from(self, step: int) -> None:
        """This side has done so many steps, as its own checkpoint says.

        Raises:
            CheckpointError: the server has seen fewer of this member.
        """
        if step > self.step:
            raise CheckpointError(
                f"this checkpoint is of step {step}, run {self.name} knows {self.step} of {self.member}: "
                "it was begun anew since; train under another run name"
            )
        self.step = step

    def say_that_it_is_there(self) -> None:
        self._transport.renew_member(self.name, self.incarnation)

    def leave(self) -> None:
        """The others no longer wait for this member, until it takes another step."""
        self.end()
        self.ends_version = None
        self._transport.leave_run(self.name)

    def end(self) -> None:
        """Say no longer that it is there."""
        self._heartbeat.stop()

    def refresh_ends(self, *, anew: bool = False) -> None:
        """Have bottom and top as the run has them, where it trains them; before a step's first forward.

        Where they are known to be, nothing is asked for, unless `anew`.
        """
        if anew:
            self._lose_step()
        for _ in range(ENDS_TRIES):
            if self._ends is None or self.ends_version is not None:
                return
            with contextlib.suppress(Rejoined):
                answer = self._ask_ends({})
                self._take_ends(answer if answer.ends else self._ask_ends(self._ends.values()))
        raise RunLost(f"run {self.name} was lost again and again: try again later")

    def _ask_ends(self, first: Mapping[str, Tensor]) -> AnswerMessage:
        key = self._key(Phase.ENDS)
        return self._ask(RunStepMessage(key=key, ends=first, deadline_s=self._deadline_s))

    def _take_ends(self, answer: AnswerMessage) -> None:
        if self._ends is not None and answer.ends:
            self._ends.write(answer.ends)
            self.ends_version = answer.versions.version

    def _gradients_of_ends(self) -> dict[str, Tensor]:
        found = {} if self._ends is None else self._ends.gradients()
        if self._ends is not None and self._unapplied and not found:
            raise UnsupportedCall(
                "bottom and top have no gradients, which this step of the cohort needs: call "
                "model.trunk.step() before zero_grad()"
            )
        return found

    def _lose_step(self) -> None:
        """It begins anew, and bottom and top are looked at again before."""
        self._forget_step()
        self.ends_version = None

    def forward(
        self,
        activation_BTD: Tensor,
        mask_BT: Tensor | None,
        positions_BT: Tensor | None,
        *,
        training: bool,
        want_input_gradient: bool,
    ) -> tuple[RunStepMessage, Tensor]:
        ask = super().forward
        for _ in range(2):
            had_begun = self._next_microbatch > 0
            try:
                return ask(
                    activation_BTD,
                    mask_BT,
                    positions_BT,
                    training=training,
                    want_input_gradient=want_input_gradient,
                )
            except Rejoined:
                if had_begun or self._ends is not None:
                    self._begin_anew()
                self._forget_step()
            except (StaleGradient, ContributionLost):
                self._lose_step()
                raise
        self._begin_anew()

    def backward(self, forward: RunStepMessage, gradient_BTD: Tensor) -> Tensor | None:
        if (forward.key.run, forward.key.incarnation) != (self.number, self.incarnation):
            self._begin_anew()
        try:
            return super().backward(forward, gradient_BTD)
        except (Rejoined, TapeExpired):
            self._begin_anew()
        except (StaleGradient, ContributionLost):
            self._lose_step()
            raise

    def evaluate(self, activation_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None) -> Tensor:
        try:
            return super().evaluate(activation_BTD, mask_BT, positions_BT)
        except Rejoined:
            return super().evaluate(activation_BTD, mask_BT, positions_BT)

    def gradient_norms(self) -> Tensor:
        try:
            return super().gradient_norms()
        except Rejoined:
            self._begin_anew()

    def apply(
        self, scale: float, learning_rate: float, *, skip: bool = False, weight: float = 1.0
    ) -> Merged | None:
        """Give what has been accumulated to the round, and wait for what the rule waits for.

        Args:
            weight: how much the gradients stand for: tokens, examples or 1, as the cohort weighs.

        Returns:
            What became of them; None for a step that was skipped.

        Raises:
            ContributionLost, StaleGradient: compute this step's microbatches again.
            RoundUnfinished: the round was not closed within `round_s`.
        """
        until = time.monotonic() + self._config.round_s
        ends = {} if skip else self._gradients_of_ends()
        while True:
            asked = RunStepMessage(
                key=self._key(Phase.OPTIMIZER_STEP),
                optimizer=OptimizerStep(scale, learning_rate, skip, weight),
                deadline_s=max(self.lease_s / BEATS_A_LEASE, 2.0),
                ends=ends,
            )
            try:
                answer = self._ask(asked)
                break
            except (RoundUnfinished, StepTimeout):
                if time.monotonic() > until:
                    raise
            except Rejoined:
                # Whether it counts, the server knows; where it does not, it says that the gradients are lost.
                continue
            except (ContributionLost, StaleGradient):
                self._lose_step()
                raise
        self.step += 1
        self._forget_step()
        self._take_ends(answer)
        self.last_merged = answer.merged
        return answer.merged

    def average(self, given: GivenEnds, since: int) -> AveragedEnds:
        """Give this member's ends, and wait for the average of all: this one, or a newer.

        Args:
            since: the last average that this member has.

        Raises:
            RoundUnfinished: it was not made within `round_s`.
        """
        until = time.monotonic() + self._config.round_s
        while True:
            back_by = time.monotonic() + self._config.reconnect_s
            try:
                _patiently(lambda: self._transport.give_ends(self.name, self._own_key, given), back_by)
                return self._averaged(given.number, since, until)
            except RunTakenOver:
                raise
            except RunLost:
                self._rejoin(back_by)
            except ContributionLost:
                # The server was restarted between the two.
                continue

    def _averaged(self, number: int, since: int, until: float) -> AveragedEnds:
        while True:
            back_by = time.monotonic() + self._config.reconnect_s
            try:
                return _patiently(
                    lambda: self._transport.take_average(self.name, self._own_key, number, since), back_by
                )
            except RoundUnfinished:
                if time.monotonic() > until:
                    raise

    @property
    def is_repeating(self) -> bool:
        """Whether it is behind what the server had of it when it came: its next step counts already."""
        return self.step < self._done_there

    @property
    def _own_key(self) -> StepKey:
        return StepKey(run=self.number, incarnation=self.incarnation)

    def _ask(self, message: RunStepMessage) -> AnswerMessage:
        """The answer, from a server that may be gone for a while.

        Raises:
            Rejoined: it had lost the run; this member is in it again.
        """
        until = time.monotonic() + self._config.reconnect_s
        # An optimizer step may wait for others: whoever asks for it counts that time.
        gone = (TrunkUnreachable,) if message.key.phase is Phase.OPTIMIZER_STEP else GONE
        try:
            answer = _patiently(lambda: self._transport.run_step(message), until, gone)
        except RunTakenOver:
            raise
        except RunLost:
            self._rejoin(until)
            raise Rejoined from None
        self.version = answer.versions.version
        self.last_timings = answer.timings
        return answer

    def _rejoin(self, until: float) -> None:
        self._enter(_patiently(lambda: self._transport.join_run(self.name, self.member), until))
        log.warning("run %s was lost and is there again: member %s goes on", self.name, self.member)

    def _enter(self, facts: RunFacts) -> None:
        if self._heartbeat.is_stopped:
            self._heartbeat = Heartbeat(self, self.lease_s)
        self.number, self.incarnation, self.version = facts.number, facts.incarnation, facts.version
        # What it was given may have been lost there.
        self.ends_version = None

    def _forget_step(self) -> None:
        with self._lock:
            self._next_microbatch = self._unapplied = 0
            self._going_back.clear()
            self._torn.clear()

    def _begin_anew(self) -> NoReturn:
        self._lose_step()
        raise ContributionLost(
            f"what step {self.step + 1} of member {self.member} had added up to is gone: compute its "
            "microbatches again (zero the client's gradients first; SplitTrainer does so by itself)"
        )


def _patiently(
    ask: Callable[[], Answered], until: float, gone: tuple[type[SplitLearnError], ...] = GONE
) -> Answered:
    """What is asked for, until then, of a server that may be gone for a while."""
    for pause_s in chain(PAUSES_S, repeat(PAUSES_S[-1])):
        try:
            return ask()
        except gone:
            if time.monotonic() > until:
                raise
            time.sleep(pause_s)
    raise AssertionError("the pauses never end")
