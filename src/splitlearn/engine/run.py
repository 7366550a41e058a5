"""One LoRA training on the trunk: float32 masters, their optimizer, and the versions they publish."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import structlog
import torch
from torch import Tensor

from splitlearn.engine import optimizer
from splitlearn.engine.account import Account, unlimited
from splitlearn.engine.checkpoint import RunSnapshot
from splitlearn.engine.cohort import Cohort
from splitlearn.engine.ends import Ends
from splitlearn.engine.member import Member, key_of
from splitlearn.engine.trunk_state import AdapterVersion
from splitlearn.errors import AccessDenied, CheckpointError, MessageError, RunBroken, RunLost
from splitlearn.vocabulary import RunSettings
from splitlearn.wire.messages import BROKEN, OPEN, AdapterMessage, OptimizerStep, RunFacts

STATE_OF = "|"
log = structlog.get_logger("splitlearn.engine")


class Run:
    """Changed by the engine's thread alone.

    `step` optimizer steps are done, skipped ones included; `version` counts those that changed the weights.
    """

    def __init__(
        self, name: str, settings: RunSettings, slot: str | None, weights: dict[str, Tensor], client: bytes
    ) -> None:
        self.name, self.settings = name, settings
        self.used_at = time.monotonic()
        self.step = 0
        self.slot = slot
        self.masters = {name: weight.requires_grad_() for name, weight in weights.items()}
        self._ends: frozenset[str] = frozenset()
        """Names of those of bottom and top among them."""
        self.optimizer = optimizer.build(settings.optimizer, self._weights) if weights else None
        self.current = self._published(0)
        self.skipped = 0
        self.client = client
        self.owner = Member(self, "", key_of(client))
        """Whose steps are a private run's."""
        self.cohort: Cohort | None = None
        """Who shares the run, where it is not private."""
        self.ends: Ends | None = None
        """What its members gave of their own ends, where those are averaged."""
        self._broken = ""
        """What failed halfway, where something did."""
        self.account = unlimited()
        self.account.take(self.held_bytes, name)

    @property
    def held_bytes(self) -> int:
        """What the run comes to hold: its weights, their gradients, and what the optimizer keeps of them."""
        return self._bytes_with(self.masters)

    @property
    def trunk_names(self) -> list[str]:
        """Of the weights that the trunk computes with, in the whole model's order."""
        return [name for name in self.masters if name not in self._ends]

    def take_ends(self, weights: Mapping[str, Tensor]) -> None:
        """Train these adapters of bottom and top with the trunk's, by the same optimizer, from now on.

        Raises:
            ResourceExhausted: they are more than the client's quota allows; nothing has changed.
        """
        assert not self._ends, "a run's ends are given once"
        self.account.take(self._bytes_with(weights), f"run {self.name}, with bottom's and top's adapters,")
        device = next(iter(self.masters.values())).device
        self._ends = frozenset(weights)
        self.masters |= {
            name: weight.detach().to(device, torch.float32, copy=True).requires_grad_()
            for name, weight in weights.items()
        }
        self.optimizer = optimizer.build(self.settings.optimizer, self._weights)
        self.current = self._published(self.version)

    def _bytes_with(self, weights: Mapping[str, Tensor]) -> int:
        size = sum(weight.nbytes for weight in weights.values())
        return 2 * size + optimizer.state_bytes(self.settings.optimizer, size)

    def charge(self, account: Account) -> None:
        """Count what the run holds in this account, and no longer in the one before.

        Raises:
            ResourceExhausted: it is more than that client's quota allows; nothing has changed.
        """
        if account is not self.account:
            account.take(self.held_bytes, f"run {self.name}, with its gradients and optimizer,")
            self.account.give_back(self.held_bytes)
            self.account = account

    @property
    def version(self) -> int:
        return self.current.number

    @property
    def members(self) -> Iterable[Member]:
        return (self.owner,) if self.cohort is None else self.cohort

    def facts(self, of: Member | None = None) -> RunFacts:
        """Where the run stands, as this member is told it; nobody in a cohort is meant by default.

        Who is no member is told how many there are, and not their names.
        """
        state = BROKEN if self._broken else OPEN
        now = time.monotonic()
        told = RunFacts(self.name, 0, 0, state, self.step, self.version, self.settings)
        if self.cohort is not None:
            counts = len(self.cohort.active()), len(self.cohort.members)
            told = replace(told, active_members=counts[0], known_members=counts[1])
        of = of or (self.owner if self.cohort is None else None)
        if of is None:
            return told
        members = () if self.cohort is None else tuple(member.facts(now) for member in self.cohort)
        return replace(told, number=of.number, incarnation=of.incarnation, member=of.name, members=members)

    def facts_for(self, client: bytes) -> RunFacts:
        """Where the run stands, as this client may know it."""
        return self.facts(None if self.cohort is None else self.cohort.of(client))

    def of_cohort(self) -> Cohort:
        """Raises RunLost where nobody shares the run."""
        if self.cohort is None:
            raise RunLost(f"run {self.name} has no members: it is a private one")
        return self.cohort

    def of_ends(self) -> Ends:
        """Raises MessageError where no ends are averaged."""
        if self.ends is None:
            raise MessageError(
                f"run {self.name} averages no ends: open it with share='fedavg' or another rule"
            )
        return self.ends

    @property
    def is_broken(self) -> bool:
        return bool(self._broken)

    def require_whole(self) -> None:
        """Raises RunBroken where a step or a restore failed halfway, until a snapshot is restored."""
        if self._broken:
            raise RunBroken(
                f"{self._broken}: restore its last checkpoint (resume_from_checkpoint=True, or "
                "model.trunk.restore); or to begin anew load the model again, then model.trunk.start_over(); "
                "the server's log has the cause",
                facts={"current_step": self.step + 1},
            )

    def belongs_to(self, client: bytes) -> bool:
        """Whether this client may use the run's steps, weights and saves; to anybody else it is not there."""
        if self.cohort is not None:
            return self.cohort.of(client) is not None
        return client == self.client

    def rejoin(self, client: bytes) -> None:
        """A private run's newer incarnation takes over: what the older one half accumulated is discarded."""
        self.client, self.used_at = client, time.monotonic()
        self.owner.rejoin()
        self.owner.last = None

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
            None if self.cohort is None else self.cohort.snapshot(),
        )

    @torch.no_grad()
    def restore(self, snapshot: RunSnapshot) -> None:
        """Become what the snapshot was; gradients that have come since are discarded.

        Raises:
            CheckpointError: it has other weights.
        """
        if self.settings.share.is_sync and not self._ends:
            beside = snapshot.weights.keys() - self.masters.keys()
            self.take_ends({name: snapshot.weights[name] for name in sorted(beside)})
        shapes = {name: master.shape for name, master in self.masters.items()}
        if {name: weight.shape for name, weight in snapshot.weights.items()} != shapes:
            raise CheckpointError(
                f"the checkpoint of run {self.name} is of another adapter: use its LoRA settings"
            )
        # From here on a failure leaves a mixture of both.
        self._broken = f"restoring step {snapshot.step} of run {self.name} failed halfway"
        for name, master in self.masters.items():
            master.data = torch.empty_like(master).copy_(snapshot.weights[name])
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
        if self.cohort is not None and snapshot.cohort is not None:
            self.cohort.restore(snapshot.cohort)
        self.owner.forget_gradients()
        self.owner.step, self.owner.last = self.step, None
        self._broken = ""

    def _optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self.masters.items():
            state = self.optimizer.state.get(master, {}) if self.optimizer is not None else {}
            for kind, value in state.items():
                if isinstance(value, Tensor):
                    yield f"{name}{STATE_OF}{kind}", value.detach().cpu().clone()

    def download(self) -> AdapterMessage:
        """The weights as they are now, on the CPU; those of bottom and top, too, where the run trains them.

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
        """What the owner of a private run has accumulated since the last step, by the weights' names."""
        return dict(zip(self.trunk_names, self.owner.contribution.gradients, strict=True))

    def apply(self, asked: OptimizerStep) -> None:
        """Step with what the owner has accumulated, and publish the weights as a new version.

        Raises:
            MessageError: no gradient has come since the last step.
            RunBroken: the optimizer began and failed; the run is refused until a snapshot is restored.
        """
        contribution = self.owner.contribution
        if asked.skip:
            self.skipped += 1
            self.step += 1
        elif self.optimizer is not None and contribution.is_empty:
            raise MessageError(
                f"step {self.step + 1} of run {self.name} has no gradients: run a backward first"
            )
        else:
            self.step_with(contribution.scaled(asked.gradient_scale), asked.learning_rate)
        self.owner.forget_gradients()
        self.owner.step = self.step

    def step_with(self, gradients: Sequence[Tensor | None], learning_rate: float) -> None:
        """One optimizer step with these gradients, in the order of the weights; a new version of them.

        Raises:
            RunBroken: the optimizer began and failed; the run is refused until a snapshot is restored.
        """
        if self.optimizer is not None:
            room = [torch.empty_like(master, requires_grad=False) for master in self.masters.values()]
            for weight, gradient in zip(self._weights, gradients, strict=True):
                weight.grad = gradient
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            try:
                self._move(room)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.current = self._published(self.version + 1)
            except Exception as error:
                # Some weights may have moved and others not: nobody can tell.
                self._broken = (
                    f"the trunk's optimizer failed halfway through step {self.step + 1} of run {self.name}"
                )
                log.error("an optimizer failed halfway", run=self.name, step=self.step + 1, exc_info=error)
                self.require_whole()
        self.step += 1

    @property
    def _weights(self) -> list[Tensor]:
        return list(self.masters.values())

    @torch.no_grad()
    def _move(self, room: Sequence[Tensor]) -> None:
        """The masters go on in memory of their own: the version that they are published as never changes."""
        for master, into in zip(self.masters.values(), room, strict=True):
            master.data = into.copy_(master)

    def _published(self, number: int) -> AdapterVersion:
        """The masters' own memory, until they move out of it at the next step."""
        every = {name: master.data.requires_grad_() for name, master in self.masters.items()}
        weights = {name: weight for name, weight in every.items() if name not in self._ends}
        ends = {name: weight for name, weight in every.items() if name in self._ends}
        return AdapterVersion(self.name, self.slot, number, weights, ends)
