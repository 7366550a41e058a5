"""The client's end of a training run: numbers its steps, and knows which gradients the trunk still holds."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import count

import xxhash
from torch import Tensor

from splitlearn.client.transport import Transport
from splitlearn.errors import (
    SettingError,
    StepTimeout,
    TapeExpired,
    TrunkUnreachable,
    UnappliedGradients,
)
from splitlearn.vocabulary import (
    CohortSettings,
    LoraSettings,
    Merged,
    Phase,
    RunSettings,
    ShareSettings,
    StepKey,
    Timings,
)
from splitlearn.wire.messages import AnswerMessage, OptimizerStep, RunFacts, RunStepMessage

# B rows   T tokens   D hidden

ASK_AGAIN_S = (0.2, 1.0)
RESUME = "Then train on from the newest checkpoint: resume_from_checkpoint=True, or --resume"
CHANGES = (Phase.BACKWARD, Phase.OPTIMIZER_STEP)
DONE_ALREADY = (
    "the trunk had done this step, only its answer was lost, so it cannot be skipped: call "
    "model.trunk.step() (it is not done twice) and your own optimizer.step() with these gradients, or resume "
    "from a checkpoint"
)
DROPPED_ALREADY = (
    "the trunk had dropped this step's gradients, only the answer was lost: call model.trunk.skip_step(), "
    "drop your own gradients too and repeat the step, or resume from a checkpoint"
)
log = logging.getLogger("splitlearn")


class ClientRun:
    """Forwards and backwards may be several at once; optimizer steps come between them.

    `accumulation` microbatches may be backward before an optimizer step is due; one more is an error,
    because then nobody seems to step the trunk.
    """

    def __init__(
        self, transport: Transport, facts: RunFacts, settings: RunSettings, deadline_s: float
    ) -> None:
        self.name, self.number, self.incarnation = facts.name, facts.number, facts.incarnation
        self.step, self.version, self.member = facts.step, facts.version, facts.member
        self.settings = settings
        self.accumulation = settings.accumulation
        self.loss_scale = 1.0
        self.ends_version: int | None = None
        """Which version bottom and top are of, where the run trains them and it is known."""
        self.forwarded_again = 0
        self.last_timings = Timings()
        self._transport = transport
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._next_microbatch = 0
        self._going_back: set[int] = set()
        # Numbers of their own: those of microbatches decide what dropout drops.
        self._evaluations = count()
        self._unapplied = 0
        # Of what an answer was lost, so that it is not known here whether it was done.
        self._torn: set[Phase] = set()

    @property
    def unapplied(self) -> int:
        """Microbatches whose gradients the trunk holds and no optimizer step has used."""
        return self._unapplied

    def forward(
        self,
        activation_BTD: Tensor,
        mask_BT: Tensor | None,
        positions_BT: Tensor | None,
        *,
        training: bool,
        want_input_gradient: bool,
    ) -> tuple[RunStepMessage, Tensor]:
        """What was asked, for `backward`; and the activation (B, T, D) at the upper cut.

        Raises:
            UnappliedGradients: the trunk's gradients of a whole accumulation wait for an optimizer step.
        """
        self._require_whole()
        if self._unapplied >= self.accumulation:
            raise UnappliedGradients(
                f"the trunk holds the gradients of {self._unapplied} microbatches that no optimizer step has "
                "used: train with SplitTrainer (or SplitTrainerMixin), or call model.trunk.step() after each "
                "optimizer.step(); for more microbatches a step set model.trunk.run.accumulation"
            )
        with self._lock:
            microbatch, self._next_microbatch = self._next_microbatch, self._next_microbatch + 1
            acked_through = self._acked_through
        key = self._key(Phase.FORWARD, microbatch)
        asked = RunStepMessage(
            key=key,
            tensor_BTD=activation_BTD,
            mask_columns_BT=mask_BT,
            positions_BT=positions_BT,
            want_input_gradient=want_input_gradient,
            seed=self._seed(key) if training else 0,
            acked_through=acked_through,
            deadline_s=self._deadline_s,
            ends_version=self.ends_version,
        )
        return asked, _tensor_of(self._ask(asked))

    def backward(self, forward: RunStepMessage, gradient_BTD: Tensor) -> Tensor | None:
        """The gradient (B, T, D) at the lower cut, where it was wanted; the trunk's own stay there."""
        asked = RunStepMessage(
            key=replace(forward.key, phase=Phase.BACKWARD),
            tensor_BTD=gradient_BTD,
            want_input_gradient=forward.want_input_gradient,
            loss_scale=self.loss_scale,
            deadline_s=self._deadline_s,
        )
        with self._lock:
            self._going_back.add(forward.key.microbatch)
        try:
            answer = self._ask(asked)
        except TapeExpired:
            self._count_forward_again()
            self._ask(forward)
            answer = self._ask(asked)
        finally:
            with self._lock:
                self._going_back.discard(forward.key.microbatch)
        with self._lock:
            # A trunk that is not trained holds no gradient that anybody could forget.
            self._unapplied += bool(self.settings.lora.r)
        return answer.activation_BTD

    def evaluate(self, activation_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None) -> Tensor:
        """The activation (B, T, D) at the upper cut, with the adapter as it is now; no graph is kept."""
        return _tensor_of(
            self._ask(
                RunStepMessage(
                    key=self._key(Phase.EVALUATE, next(self._evaluations)),
                    tensor_BTD=activation_BTD,
                    mask_columns_BT=mask_BT,
                    positions_BT=positions_BT,
                    want_input_gradient=False,
                    deadline_s=self._deadline_s,
                    ends_version=self.ends_version,
                )
            )
        )

    def gradient_norms(self) -> Tensor:
        """(n,): the norm of each trunk weight's gradient in the model's order, -1 where there is none."""
        key = self._key(Phase.GRADIENT_NORMS)
        with self._lock:
            acked_through = self._acked_through
        answer = self._ask(RunStepMessage(key=key, acked_through=acked_through, deadline_s=self._deadline_s))
        assert answer.norms is not None
        return answer.norms

    def apply(
        self, scale: float, learning_rate: float, *, skip: bool = False, weight: float = 1.0
    ) -> Merged | None:
        """Have the trunk's optimizer step, or drop what has been accumulated.

        Asked again after its answer was lost, a step is done once. `weight` is for cohorts.

        Raises:
            UnappliedGradients: it is not known what the trunk holds, because an answer was lost; or it is
                known now that the trunk has done the other thing.
        """
        if not skip and Phase.BACKWARD in self._torn:
            self._require_whole()
        answer = self._ask(
            RunStepMessage(
                key=self._key(Phase.OPTIMIZER_STEP),
                optimizer=OptimizerStep(scale, learning_rate, skip),
                deadline_s=self._deadline_s,
            )
        )
        if answer.stepped == skip:
            # Of an answer that was lost before; as it stands until its client does the same.
            self._torn.add(Phase.OPTIMIZER_STEP)
            raise UnappliedGradients(DONE_ALREADY if skip else DROPPED_ALREADY)
        with self._lock:
            self.step += 1
            self._next_microbatch = self._unapplied = 0
            self._torn.clear()
        return answer.merged

    def _ask(self, message: RunStepMessage) -> AnswerMessage:
        """The answer; asked again where it was lost on the way, because the server does a step once."""
        for pause_s in (*ASK_AGAIN_S, None):
            try:
                answer = self._transport.run_step(message)
                break
            except (TrunkUnreachable, StepTimeout) as error:
                if pause_s is None:
                    # Whether it was done is not known here.
                    self._torn.update({message.key.phase}.intersection(CHANGES))
                    raise error.advised(RESUME) from None
                time.sleep(pause_s)
        self.version = answer.versions.version
        self.last_timings = answer.timings
        return answer

    def _require_whole(self) -> None:
        if self._torn == {Phase.OPTIMIZER_STEP}:
            raise UnappliedGradients(
                "the answer to an optimizer step was lost, and with it whether the trunk has done it: call "
                "model.trunk.step() again (it is done once) and then your own optimizer.step(), or resume "
                "from a checkpoint"
            )
        if self._torn:
            raise UnappliedGradients(
                "an answer of the trunk was lost, and with it whether it holds a microbatch's gradients: "
                "call model.trunk.skip_step() and repeat the step, or resume from a checkpoint"
            )

    @property
    def _acked_through(self) -> int:
        """Below it no microbatch's backward waits for its answer; held under the lock."""
        return min(self._going_back, default=self._next_microbatch)

    def _key(self, phase: Phase, microbatch: int = 0) -> StepKey:
        return StepKey(
            run=self.number,
            incarnation=self.incarnation,
            step=self.step + 1,
            microbatch=microbatch,
            phase=phase,
        )

    def _seed(self, key: StepKey) -> int:
        """Of dropout: the same whenever this microbatch is forwarded; never 0, which is none."""
        whose = f"/{self.member}" if self.member else ""
        name = f"{self.settings.seed}/{key.step}/{key.microbatch}{whose}".encode()
        return xxhash.xxh3_64_intdigest(name) | 1

    def _count_forward_again(self) -> None:
        self.forwarded_again += 1
        if self.forwarded_again == 1:
            log.warning(
                "the trunk no longer had what a forward kept, and forwards again by itself; if that happens "
                "often, start the server with a larger --tape-budget"
            )


def _tensor_of(answer: AnswerMessage) -> Tensor:
    assert answer.activation_BTD is not None
    return answer.activation_BTD


def require_same(name: str, there: RunSettings, wanted: RunSettings) -> None:
    """Each step brings its learning rate; what else a run was opened with stays.

    Raises:
        SettingError: what is wanted now is something else; it names what.
    """
    if replace(there.optimizer, learning_rate=0.0) != replace(wanted.optimizer, learning_rate=0.0):
        raise SettingError(
            f"run {name} was opened with {there.optimizer}, now {wanted.optimizer} is wanted: "
            "make the trainer before the model is first called, or take another run name"
        )
    differing = list(_differences(there, wanted))
    if differing:
        raise SettingError(
            f"run {name} was opened with other settings ({'; '.join(differing)}): "
            "load the model with those that it has, or take another run name"
        )


def _differences(there: RunSettings, wanted: RunSettings) -> Iterator[str]:
    """What would make another run of it; how the tape is kept, and the accumulation, would not."""
    for each in fields(LoraSettings):
        has, asked = getattr(there.lora, each.name), getattr(wanted.lora, each.name)
        if has != asked:
            yield f"LoRA's {each.name}: {has}, not {asked}"
    if there.precision.autocast != wanted.precision.autocast:
        yield f"autocast: {there.precision.autocast or 'off'}, not {wanted.precision.autocast or 'off'}"
    if there.seed != wanted.seed:
        yield f"seed: {there.seed}, not {wanted.seed}"
    for each in fields(CohortSettings):
        has, asked = getattr(there.cohort, each.name), getattr(wanted.cohort, each.name)
        if has != asked:
            yield f"the cohort's {each.name}: {has}, not {asked}"
    for each in fields(ShareSettings):
        has, asked = getattr(there.share, each.name), getattr(wanted.share, each.name)
        if has != asked:
            yield f"share's {each.name}: {has}, not {asked}"
    if there.allow_download != wanted.allow_download:
        yield f"allow_download: {there.allow_download}, not {wanted.allow_download}"
