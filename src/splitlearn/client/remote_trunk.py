"""The one remote layer: sends the activation at the lower cut, gives back the one at the upper cut."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from splitlearn.client import run_entry
from splitlearn.client.call_context import Call, CallContext
from splitlearn.client.member_run import MemberRun
from splitlearn.client.plain_steps import PlainSteps
from splitlearn.client.run import ClientRun
from splitlearn.client.sent import without_cache
from splitlearn.client.shared_ends import SharedEnds
from splitlearn.client.transport import Transport
from splitlearn.client.trunk_operation import NO_RUN, Trained, Untrained
from splitlearn.config import ClientConfig
from splitlearn.errors import RunLost, UnsupportedCall
from splitlearn.vocabulary import Averaged, Fate, LoraSettings, Merged, StepKey, Timings, Versions
from splitlearn.wire.messages import (
    AdapterMessage,
    OpenRun,
    OpenSession,
    RunFacts,
)

if TYPE_CHECKING:
    from splitlearn.client.ends import OwnEnds

# B rows   T new tokens   D hidden


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
        self.own_ends: OwnEnds | None = None
        """What averages bottom and top with the other members', where `share=` says so."""
        self.last_average: Averaged | None = None
        """What that last did."""
        # Without it nothing would ask for a gradient where the bottom is frozen.
        self._anchor = torch.zeros((), requires_grad=True)
        self._run: ClientRun | None = None
        self.ends: SharedEnds | None = None
        """The adapters of bottom and top, where the run trains them; see `share_run`."""
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
        self._plain_steps = PlainSteps(transport, trunk, config, self._opening)

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
        if self.own_ends is not None and merged is not None and merged.fate is not Fate.DROPPED:
            self.own_ends.count(weight)
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
            entry = run_entry.enter(self.transport, self.planned, self._start)
            self._opened_here = entry.opened_here
            if not (entry.opened_here or self.is_shared):
                self.joined_at_step = entry.facts.step
            self._run = self._part_in(entry.facts, self.planned)
        return self._run

    @property
    def is_shared(self) -> bool:
        """Whether the model was loaded as a cohort's member."""
        return self.planned is not None and not self.planned.settings.cohort.is_private

    def refresh_ends(self, *, anew: bool = False) -> None:
        """Before a forward: bottom and top as the run has them, where a cohort trains them together.

        Evaluation uses them as they are: it makes nobody a member again who has left.
        """
        if self.ends is not None and (anew or self._run is None or torch.is_grad_enabled()):
            run = self.run
            if isinstance(run, MemberRun):
                run.refresh_ends(anew=anew)

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
        facts = run_entry.restored(self.transport, planned, name, step, digest)
        self.planned = replace(planned, name=name)
        self._was_closed, self.joined_at_step, self._has_stepped = False, 0, bool(step)
        self.gradient_scale = 1.0
        self._run = self._part_in(facts, planned)
        if isinstance(self._run, MemberRun):
            self._run.go_on_from(step)

    def require_own_run(self) -> None:
        """Raises RunTakenOver where the run is open as another's, who restored it after ours was lost."""
        if self._run is not None:
            run_entry.require_own(self.transport, self._run)

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

    def _part_in(self, facts: RunFacts, planned: OpenRun) -> ClientRun:
        return run_entry.part_in(self.transport, facts, planned.settings, self._config, self.ends)

    def exchange(self, activation_BTD: Tensor, call: Call) -> Tensor:
        """A step of no run: activation (B, T, D) at the lower cut -> at the upper cut."""
        answer = self._plain_steps.ask(activation_BTD, call)
        assert answer.activation_BTD is not None
        self.last_timings = answer.timings
        return answer.activation_BTD.to(activation_BTD.device)

    def _opening(self) -> OpenSession:
        """A session generates with the run's adapter as it is when the session opens."""
        if self.planned is None or not self.planned.settings.lora.r:
            return OpenSession()
        return OpenSession(adapter=Versions(self.run.name), precision=self.run.settings.precision)
