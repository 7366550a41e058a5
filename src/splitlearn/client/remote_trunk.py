"""The one remote layer: sends the activation at the lower cut, gives back the one at the upper cut."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from splitlearn.client.call_context import Call, CallContext
from splitlearn.client.member_run import MemberRun
from splitlearn.client.remote_cache import session_of
from splitlearn.client.run import ClientRun, require_same
from splitlearn.client.sent import positions_to_send, require_in_step, without_cache
from splitlearn.client.transport import Transport
from splitlearn.client.trunk_operation import NO_RUN, Trained, Untrained
from splitlearn.config import ClientConfig
from splitlearn.errors import MessageError, RunLost, RunTakenOver, SettingError, UnsupportedCall
from splitlearn.vocabulary import (
    Averaged,
    Fate,
    LoraSettings,
    Merged,
    RunSettings,
    StepKey,
    Timings,
    Versions,
)
from splitlearn.wire.host_memory import to_host
from splitlearn.wire.messages import (
    SAVED,
    AdapterMessage,
    AnswerMessage,
    OpenRun,
    OpenSession,
    RunFacts,
    StepMessage,
)

if TYPE_CHECKING:
    from splitlearn.client.ends import OwnEnds

# B rows   T new tokens   D hidden

OPEN_TRIES = 5


class RemoteTrunk(nn.Module):
    """Stands at index k of the client's layers and holds no weight.

    Raises (from `forward`): whatever the trunk answers with, by the step's deadline.
    """

    def __init__(self, transport: Transport, trunk: range, config: ClientConfig) -> None:
        super().__init__()
        self.transport = transport
        self.last_timings = Timings()
        self.planned: OpenRun | None = None
        """The training run that the first training step opens, where the model was loaded with one."""
        self.gradient_scale = 1.0
        """What the next optimizer step multiplies the trunk's gradients by; clipping sets it."""
        self.lora = LoraSettings(r=0)
        """The adapter's settings as the user gave them."""
        self.ends: OwnEnds | None = None
        """What averages bottom and top with the other members', where `share=` says so."""
        self.last_average: Averaged | None = None
        """What that last did."""
        # Without it nothing would ask for a gradient where the bottom is frozen.
        self._anchor = torch.zeros((), requires_grad=True)
        self._run: ClientRun | None = None
        self.is_named = False
        """Whether the run's name is its user's choice."""
        self._was_closed = False
        self._has_stepped = False
        self._opened_here = False
        self.joined_at_step = 0
        """Optimizer steps that the run had done, before this model, when it was joined."""
        self._acknowledged: tuple[int, ...] = ()
        self._start: AdapterMessage | None = None
        self.layers = trunk
        self._config = config
        self._context: CallContext | None = None
        self._lone_steps = count(1)

    def listen_to(self, context: CallContext) -> None:
        """Take masks, positions and cache from the calls of this decoder."""
        self._context = context

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, **asked: Any) -> Tensor:
        """Activation (B, T, D) at the lower cut -> activation (B, T, D) at the upper cut."""
        assert self._context is not None
        if self._context.stand_in is not None:
            return self._context.stand_in(hidden_states)
        call = self._context.call
        answer_BTD: Tensor
        if self.planned is None or call.cache is not None:
            answer_BTD = Untrained.apply(hidden_states, self, call)  # type: ignore[no-untyped-call]
        elif torch.is_grad_enabled():
            answer_BTD = Trained.apply(hidden_states, self._anchor, self, self.run, call)  # type: ignore[no-untyped-call]
        else:
            sent_BTD, mask_BT, positions_BT = without_cache(hidden_states, call)
            answer_BTD = self.run.evaluate(sent_BTD, mask_BT, positions_BT).to(hidden_states.device)
        return answer_BTD

    def grad_norms(self) -> Tensor:
        """(n,): the norm of each trunk weight's gradient, in the whole model's order; -1 for none.

        Raises:
            UnsupportedCall: the model was loaded without `lora=`.
        """
        return self.run.gradient_norms()

    def step(
        self, scale: float | None = None, learning_rate: float | None = None, weight: float = 1.0
    ) -> Merged | None:
        """Have the trunk's optimizer step, after scaling its gradients.

        In a cohort they are given to the round, which may wait for others.

        Args:
            scale: what to multiply them by; by default what clipping found, else 1. In a cohort they are
                then the mean of this member's batch.
            learning_rate: by default the one that the run was opened with.
            weight: how much of a cohort's batch they stand for: its tokens, its examples, or 1, as the
                cohort weighs.

        Returns:
            What became of them in a cohort: where they were dropped, drop your own gradients, too.

        Raises:
            ContributionLost, StaleGradient: in a cohort: zero your gradients and compute this step again.
        """
        run = self.run
        merged = run.apply(
            self.gradient_scale if scale is None else scale,
            run.settings.optimizer.learning_rate if learning_rate is None else learning_rate,
            weight=weight,
        )
        self.gradient_scale, self._has_stepped = 1.0, True
        if self.ends is not None and merged is not None and merged.fate is not Fate.DROPPED:
            self.ends.count(weight)
        return merged

    def skip_step(self) -> None:
        """Drop the gradients that the trunk has accumulated, for example because others overflowed."""
        self.run.apply(1.0, 0.0, skip=True)
        self.gradient_scale = 1.0

    @property
    def is_training(self) -> bool:
        """Whether the run has been opened."""
        return self._run is not None

    @property
    def run(self) -> ClientRun:
        """The training run, opened here at its first use, or joined where its name is there already.

        Raises:
            UnsupportedCall: the model was loaded without `lora=`; or its run is gone, and only a new one
                could be opened for a bottom and a top that have been trained.
        """
        if self._run is None:
            if self.planned is None:
                raise UnsupportedCall(NO_RUN)
            if self._was_closed:
                raise UnsupportedCall("the run was closed: restore it, or load the model again")
            if self._has_stepped:
                raise UnsupportedCall(
                    "this model's bottom and top have been trained, a trunk that begins anew does not fit "
                    "them: load the model again, and train that one"
                )
            facts = self._open_or_join(self.planned)
            require_same(facts.name, facts.settings, self.planned.settings)
            self._run = self._entered(facts, self.planned.settings)
        return self._run

    @property
    def is_shared(self) -> bool:
        """Whether the model was loaded as a cohort's member."""
        return self.planned is not None and not self.planned.settings.cohort.is_private

    def save(self) -> RunFacts:
        """Have the run written to the server's disk as it stands now; a cohort's is there already.

        Raises:
            CheckpointError: it could not be written; the checkpoint before it is still there.
            RunTakenOver: somebody else trains the run now.
        """
        run = self.run
        if self.is_shared:
            return self.transport.run_facts(run.name)
        at = StepKey(run=run.number, incarnation=run.incarnation, step=run.step)
        return self.transport.save_run(run.name, at, self._acknowledged)

    def acknowledge(self, *steps: int) -> None:
        """Both sides have checkpoints of these: the server may delete others that are older than the newest.

        It does so at the next save.
        """
        self._acknowledged = steps

    def restore(self, name: str, step: int, digest: int = 0) -> None:
        """Make the run of this name, as it was saved at this step, the model's run.

        A cohort's goes on from where it stands; this member, from its own step.

        `digest` is what `save` told of that step: another checkpoint of the same name and step is refused.

        Raises:
            CheckpointError: there is no such checkpoint, or it is torn or another one.
            SettingError: it was saved with other LoRA settings, or another optimizer.
        """
        planned = self.planned
        if planned is None:
            raise UnsupportedCall(NO_RUN)
        if self.is_shared:
            facts = self.transport.join_run(name, planned.member)
        else:
            facts = self.transport.restore_run(name, step, digest)
        require_same(facts.name, facts.settings, planned.settings)
        self.planned = replace(planned, name=name)
        self._was_closed, self.joined_at_step, self._has_stepped = False, 0, bool(step)
        self.gradient_scale = 1.0
        self._run = self._entered(facts, planned.settings)
        if isinstance(self._run, MemberRun):
            self._run.go_on_from(step)

    def require_own_run(self) -> None:
        """Raises RunTakenOver where the run is open as another's, who restored it after ours was lost."""
        if self._run is None:
            return
        try:
            there = self.transport.run_facts(self._run.name)
        except RunLost:
            return
        ours = (self._run.number, self._run.incarnation)
        if there.state != SAVED and (there.number, there.incarnation) != ours:
            raise RunTakenOver(
                f"run {there.name} was resumed by somebody else after this side had lost it, and is theirs "
                "now: let this training end"
            )

    def close_run(self) -> None:
        """Free what the run holds in the server's memory; what was saved of it can be resumed from.

        A cohort's member leaves it.
        """
        if self._run is not None:
            with contextlib.suppress(RunLost):
                if isinstance(self._run, MemberRun):
                    self._run.leave()
                else:
                    self.transport.close_run(self._run.name)
            self._run, self._was_closed = None, True

    def leave(self) -> None:
        """A cohort's rounds no longer wait for this member, until its next step; evaluating is no step."""
        if isinstance(self._run, MemberRun):
            with contextlib.suppress(RunLost):
                self._run.leave()

    def end(self) -> None:
        """The model is closed: nothing is said to the server any more."""
        if isinstance(self._run, MemberRun):
            self._run.end()

    def start_over(self) -> None:
        """Delete the run, and what is saved of it, from the server: the next step opens it anew.

        A model that has been trained must be loaded again for that: its bottom and top have not begun anew.

        Raises:
            UnsupportedCall: the model was loaded without `lora=`.
        """
        if self.planned is None:
            raise UnsupportedCall(NO_RUN)
        with contextlib.suppress(RunLost):
            self.transport.delete_run(self.planned.name)
        self._run, self._was_closed, self.joined_at_step = None, False, 0
        self.gradient_scale = 1.0

    def reopen_if_unused(self) -> bool:
        """Let the next step open the run anew, where this model opened it and nobody has trained it yet."""
        if self._run is None or self._run.step or not self._opened_here:
            return False
        self.close_run()
        self._was_closed = False
        return True

    def start_from(self, adapter: AdapterMessage) -> None:
        """Let the run begin with these weights; they go to the trunk when it opens."""
        self._start = adapter

    def _entered(self, facts: RunFacts, settings: RunSettings) -> ClientRun:
        if self.is_shared:
            return MemberRun(self.transport, facts, settings, self._config)
        return ClientRun(self.transport, facts, settings, self._config.train_s)

    def _enter_cohort(self, planned: OpenRun) -> RunFacts:
        """Whoever comes first opens the run; the others join it."""
        for _ in range(OPEN_TRIES):
            try:
                self._require_joinable(self.transport.run_facts(planned.name), planned)
                return self.transport.join_run(planned.name, planned.member)
            except RunLost:
                try:
                    return self._open(planned)
                except MessageError:
                    # Somebody else was quicker.
                    continue
        raise RunLost(f"run {planned.name} could be neither joined nor opened: try again")

    def _open_or_join(self, planned: OpenRun) -> RunFacts:
        if self.is_shared:
            return self._enter_cohort(planned)
        try:
            # To join turns away who trains it now, so that comes last.
            self._require_joinable(self.transport.run_facts(planned.name), planned)
            joined = self.transport.join_run(planned.name)
        except RunLost:
            self._opened_here = True
        else:
            self.joined_at_step = joined.step
            return joined
        return self._open(planned)

    def _open(self, planned: OpenRun) -> RunFacts:
        if self._start is None or not planned.settings.lora.r:
            return self.transport.open_run(planned)
        self.transport.load_adapter(self._start)
        try:
            return self.transport.open_run(replace(planned, start_from=self._start.name))
        finally:
            self.transport.unload_adapter(self._start.name)

    def _require_joinable(self, there: RunFacts, planned: OpenRun) -> None:
        if there.state == SAVED:
            return
        require_same(there.name, there.settings, planned.settings)
        if self._start is not None:
            raise SettingError(
                f"run {there.name} is open already and cannot start from another adapter: "
                "take another run name, or call model.trunk.start_over()"
            )

    def exchange(self, activation_BTD: Tensor, call: Call) -> Tensor:
        sent_BTD = to_host(activation_BTD)
        if call.cache is None:
            answer = self._lone_step(sent_BTD, call)
        else:
            session = session_of(call.cache, self.layers, self.transport, self._opening)
            require_in_step(call.cache, self.layers, session.length + sent_BTD.shape[1])
            positions_BT = positions_to_send(call, sent_BTD, session.length)
            answer = session.step(sent_BTD, call.mask_BL, positions_BT, self._deadline_s(sent_BTD))
        assert answer.activation_BTD is not None
        self.last_timings = answer.timings
        return answer.activation_BTD.to(activation_BTD.device)

    def _lone_step(self, sent_BTD: Tensor, call: Call) -> AnswerMessage:
        _, mask_BT, positions_BT = without_cache(sent_BTD, call)
        return self.transport.step(
            StepMessage(
                key=StepKey(step=next(self._lone_steps)),
                activation_BTD=sent_BTD,
                mask_columns_BT=mask_BT,
                positions_BT=positions_BT,
                deadline_s=self._deadline_s(sent_BTD),
            )
        )

    def _opening(self) -> OpenSession:
        """A session generates with the run's adapter as it is when the session opens."""
        if self.planned is None or not self.planned.settings.lora.r:
            return OpenSession()
        return OpenSession(adapter=Versions(self.run.name), precision=self.run.settings.precision)

    def _deadline_s(self, activation_BTD: Tensor) -> float:
        rows, tokens = activation_BTD.shape[:2]
        is_decode = rows * tokens <= self._config.decode_tokens
        return self._config.decode_s if is_decode else self._config.prefill_s
