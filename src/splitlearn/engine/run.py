"""One LoRA training on the trunk: float32 masters, their optimizer, and the versions they publish."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import structlog
import torch
from torch import Tensor

from splitlearn.engine import optimizer
from splitlearn.engine.checkpoint import RunSnapshot
from splitlearn.engine.trunk_state import AdapterVersion
from splitlearn.errors import AccessDenied, CheckpointError, MessageError, RunBroken, StepOutOfOrder
from splitlearn.vocabulary import RunSettings
from splitlearn.wire.messages import BROKEN, OPEN, AdapterMessage, AnswerMessage, OptimizerStep, RunFacts

NO_GRADIENT = -1.0
STATE_OF = "|"
log = structlog.get_logger("splitlearn.engine")

Microbatch = tuple[int, int]
"""The optimizer step that its forward was for, and its number in it."""


class Run:
    """Changed by the engine's thread alone.

    `step` optimizer steps are done, skipped ones included; `version` counts those that changed the weights.
    """

    def __init__(
        self,
        name: str,
        number: int,
        settings: RunSettings,
        slot: str | None,
        weights: dict[str, Tensor],
        client: bytes,
    ) -> None:
        self.name, self.number, self.settings = name, number, settings
        self.client = client
        self.incarnation = 1
        self.used_at = time.monotonic()
        self.step = 0
        self.slot = slot
        self.masters = {name: weight.requires_grad_() for name, weight in weights.items()}
        self.optimizer = optimizer.build(settings.optimizer, self._weights) if weights else None
        self.current = self._published(0)
        self.skipped = 0
        self._gradients: list[Tensor | None] = [None] * len(weights)
        self._accumulated: set[Microbatch] = set()
        self._last_step: AnswerMessage | None = None
        self._broken = ""
        """What failed halfway, where something did."""

    @property
    def version(self) -> int:
        return self.current.number

    @property
    def next_step(self) -> int:
        return self.step + 1

    def facts(self) -> RunFacts:
        state = BROKEN if self._broken else OPEN
        return RunFacts(
            self.name, self.number, self.incarnation, state, self.step, self.version, self.settings
        )

    def require_whole(self) -> None:
        """Raises RunBroken where a step or a restore failed halfway, until a snapshot is restored."""
        if self._broken:
            raise RunBroken(
                f"{self._broken}: restore its last checkpoint (resume_from_checkpoint=True, or "
                "model.trunk.restore); or to begin anew load the model again, then model.trunk.start_over(); "
                "the server's log has the cause",
                facts={"current_step": self.next_step},
            )

    def rejoin(self, client: bytes) -> None:
        """A newer incarnation takes over: what the older one half accumulated is discarded."""
        self.client, self.used_at = client, time.monotonic()
        self.incarnation += 1
        self._forget_work()

    def snapshot(self) -> RunSnapshot:
        """Copies of all that the run is, to be written elsewhere; raises RunBroken where it is not whole."""
        self.require_whole()
        return RunSnapshot(
            self.name,
            self.step,
            self.version,
            self.skipped,
            self.settings,
            {name: master.detach().cpu().clone() for name, master in self.masters.items()},
            dict(self._optimizer_state()),
        )

    @torch.no_grad()
    def restore(self, snapshot: RunSnapshot) -> None:
        """Become what the snapshot was; gradients that have come since are discarded.

        Raises:
            CheckpointError: it has other weights.
        """
        shapes = {name: master.shape for name, master in self.masters.items()}
        if {name: weight.shape for name, weight in snapshot.weights.items()} != shapes:
            raise CheckpointError(
                f"the checkpoint of run {self.name} is of another adapter: use its LoRA settings"
            )
        # From here on a failure leaves a mixture of both.
        self._broken = f"restoring step {snapshot.step} of run {self.name} failed halfway"
        for name, master in self.masters.items():
            master.copy_(snapshot.weights[name])
        if self.optimizer is not None:
            state: dict[int, dict[str, Tensor]] = defaultdict(dict)
            places = {name: place for place, name in enumerate(self.masters)}
            for key, value in snapshot.optimizer.items():
                name, _, kind = key.rpartition(STATE_OF)
                # torch would take the snapshot's own tensors and step them.
                state[places[name]][kind] = value.clone()
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
        self.step, self.skipped = snapshot.step, snapshot.skipped
        self.current = self._published(snapshot.version)
        self._forget_work()
        self._broken = ""

    def _optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self.masters.items():
            state = self.optimizer.state.get(master, {}) if self.optimizer is not None else {}
            for kind, value in state.items():
                if isinstance(value, Tensor):
                    yield f"{name}{STATE_OF}{kind}", value.detach().cpu().clone()

    def accumulate_once(
        self, microbatch: Microbatch, gradients: Sequence[Tensor | None], loss_scale: float
    ) -> None:
        """A microbatch whose answer was lost, and is computed again, counts once."""
        if not self.has_accumulated(microbatch):
            self.accumulate(gradients, loss_scale)
            self._accumulated.add(microbatch)

    def has_accumulated(self, microbatch: Microbatch) -> bool:
        """Whether this microbatch of a step is among what the next optimizer step uses."""
        return microbatch in self._accumulated

    def accumulate(self, gradients: Sequence[Tensor | None], loss_scale: float) -> None:
        """Add a microbatch's gradients, in the order of the weights; the scale is taken out first."""
        # Into a list of its own: where memory ends halfway, nothing has been added.
        self._gradients = [
            _sum(held, gradient, loss_scale)
            for held, gradient in zip(self._gradients, gradients, strict=True)
        ]

    def download(self) -> AdapterMessage:
        """The weights as they are now, on the CPU.

        Raises:
            AccessDenied: the run was opened so that the trunk's part stays on the server.
            RunBroken: an optimizer step failed halfway.
        """
        if not self.settings.allow_download:
            raise AccessDenied(
                f"run {self.name} was opened with allow_download off: its trunk part stays on this server"
            )
        self.require_whole()
        weights = {name: weight.detach().cpu().clone() for name, weight in self.masters.items()}
        return AdapterMessage(self.name, self.version, self.settings.lora, weights)

    def gradients(self) -> dict[str, Tensor | None]:
        """What has been accumulated since the last step, by the weights' names."""
        return dict(zip(self.masters, self._gradients, strict=True))

    def gradient_norms(self) -> Tensor:
        """The 2-norm of each weight's gradient (n,), as torch clips by them; -1 where there is none."""
        there = [gradient for gradient in self._gradients if gradient is not None]
        norms = iter(torch._foreach_norm(there, 2.0) if there else [])
        absent = torch.tensor(NO_GRADIENT)
        return torch.stack(
            [absent if gradient is None else next(norms).cpu() for gradient in self._gradients]
            or [torch.empty(())]
        )[: len(self._gradients)]

    def apply(self, asked: OptimizerStep) -> None:
        """Step with what has been accumulated, and publish the weights as a new version.

        Raises:
            MessageError: no gradient has come since the last step.
            RunBroken: the optimizer began and failed; the run is refused until a snapshot is restored.
        """
        if not asked.skip and self.optimizer is not None:
            room = [torch.empty_like(master, requires_grad=False) for master in self.masters.values()]
            self._give_gradients(asked, self.optimizer)
            try:
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.current = self._published(self.version + 1, room)
            except Exception as error:
                # Some weights may have moved and others not: nobody can tell.
                self._broken = (
                    f"the trunk's optimizer failed halfway through step {self.next_step} of run {self.name}"
                )
                log.error("an optimizer failed halfway", run=self.name, step=self.next_step, exc_info=error)
                self.require_whole()
        self.skipped += asked.skip
        self.step += 1
        self._forget_work()

    def kept_step(self, step: int) -> AnswerMessage | None:
        """The answer to an optimizer step that was done already; None where it is the next one.

        Raises:
            StepOutOfOrder: it is neither.
        """
        last = self._last_step
        if step == self.step and last is not None and last.key.step == step:
            return last
        self.require_next(step)
        return None

    def keep_step(self, answer: AnswerMessage) -> None:
        self._last_step = answer

    def require_next(self, step: int) -> None:
        """Raises StepOutOfOrder where a step is not the one that comes next."""
        if step != self.next_step:
            raise StepOutOfOrder(
                f"step {step} of run {self.name} cannot be done: the next is step {self.next_step}",
                facts={"current_step": self.next_step, "current_version": self.version},
            )

    @property
    def _weights(self) -> list[Tensor]:
        return list(self.masters.values())

    def _give_gradients(self, asked: OptimizerStep, optimizer: torch.optim.Optimizer) -> None:
        if all(gradient is None for gradient in self._gradients):
            raise MessageError(
                f"step {self.next_step} of run {self.name} has no gradients: run a backward first"
            )
        for weight, gradient in zip(self._weights, self._gradients, strict=True):
            # Not in place: a step that fails is asked for again.
            weight.grad = None if gradient is None else gradient * asked.gradient_scale
        for group in optimizer.param_groups:
            group["lr"] = asked.learning_rate

    @torch.no_grad()
    def _published(self, number: int, room: Sequence[Tensor] | None = None) -> AdapterVersion:
        """Copies of the masters, in memory that was made sure of before the step."""
        room = room or [torch.empty_like(master, requires_grad=False) for master in self.masters.values()]
        weights = {
            name: into.copy_(master).requires_grad_()
            for (name, master), into in zip(self.masters.items(), room, strict=True)
        }
        return AdapterVersion(self.name, self.slot, number, weights)

    def _forget_work(self) -> None:
        """What was accumulated, and the answer to the step before."""
        self._gradients = [None] * len(self._gradients)
        self._accumulated.clear()
        self._last_step = None


def _sum(held: Tensor | None, gradient: Tensor | None, loss_scale: float) -> Tensor | None:
    if gradient is None:
        return held
    unscaled = gradient.float() if loss_scale == 1.0 else gradient.float() * (1.0 / loss_scale)
    return unscaled if held is None else held + unscaled
