"""The ends that a run's members gave, until all that are waited for have: then they are averaged."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from torch import Tensor

from splitlearn.engine.averaging import A, B, Mean, added, mean_of
from splitlearn.engine.disk_budget import DiskBudget
from splitlearn.engine.ends_average import FILE, EndsAverage
from splitlearn.errors import (
    AdapterError,
    ContributionLost,
    MessageError,
    ResourceExhausted,
    RunLost,
    StepOutOfOrder,
)
from splitlearn.vocabulary import RunSettings
from splitlearn.wire.messages import GivenEnds

NAME = re.compile(rf"[A-Za-z0-9_.]{{1,400}}({re.escape(A)}|{re.escape(B)})")
FFA = "ffa"
MAX_WEIGHT = 1e15
log = structlog.get_logger("splitlearn.cohort")


@dataclass(frozen=True, slots=True)
class Awaited:
    """Whom an average waits for, as the engine's thread sees it at this version of the run."""

    names: frozenset[str]
    is_complete: bool
    """Whether as many members have joined as the cohort is to have."""
    version: int


class EndsBudget:
    """Memory for ends of all runs. Called by any thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._held = max_bytes, 0
        self._lock = threading.Lock()

    def take(self, bytes: int) -> None:
        """Raises ResourceExhausted where so many further bytes do not fit."""
        with self._lock:
            if self._held + bytes > self._max_bytes:
                raise ResourceExhausted(
                    f"the ends take {bytes:,} bytes, {self._max_bytes - self._held:,} of "
                    f"{self._max_bytes:,} are free for those of all runs: use a smaller rank, or start the "
                    "server with more (runs.max_ends_bytes)",
                    facts={"wanted_bytes": bytes, "total_bytes": self._max_bytes},
                )
            self._held += bytes

    def give_back(self, bytes: int) -> None:
        with self._lock:
            self._held -= bytes


class Ends:
    """Called by any thread; the engine's only ends it. One average at a time.

    What a member is told is on the disk before. What was given and not averaged yet is held in memory alone:
    after a restart the members give it again.
    """

    def __init__(self, run: str, settings: RunSettings, budget: EndsBudget) -> None:
        self._run, self._share = run, settings.share
        self._ranks = {settings.lora.r, *settings.lora.rank_pattern.values()}
        self._budget = budget
        self._lock = threading.Lock()
        self._given: dict[str, GivenEnds] = {}
        self._newest: EndsAverage | None = None
        self._folder: Path | None = None
        self._disk: DiskBudget | None = None
        self._is_over = False

    @property
    def number(self) -> int:
        """Averages that were made."""
        return 0 if self._newest is None else self._newest.number

    def wake(self, folder: Path, disk: DiskBudget | None = None) -> None:
        """Before anything else: go on from what is kept in this folder.

        Raises:
            CheckpointError: that is torn.
        """
        with self._lock:
            if self._folder is None:
                newest = EndsAverage.read(folder)
                if newest is not None:
                    self._budget.take(newest.nbytes)
                self._newest, self._folder, self._disk = newest, folder, disk

    def give(self, member: str, given: GivenEnds) -> None:
        """A member's ends for an average; given twice they count once, and for one that is made, not at all.

        Raises:
            AdapterError, MessageError: they are not what the other members' are, or no numbers.
            ResourceExhausted: there is no room for them.
            StepOutOfOrder: the average before it was not made.
        """
        with self._lock:
            self._require_open()
            if given.number > self.number + 1:
                raise StepOutOfOrder(
                    f"average {given.number} of run {self._run} cannot be made: the next is "
                    f"{self.number + 1}",
                    facts={"next_average": self.number + 1},
                )
            self._require_fitting(given)
            if given.number == self.number + 1:
                before = self._given[member].nbytes if member in self._given else 0
                self._budget.take(given.nbytes - before)
                self._given[member] = given

    def find(self, member: str, number: int) -> EndsAverage | None:
        """The newest average, if this one is made; None while it waits for others.

        Raises:
            ContributionLost: this member has given nothing for it.
        """
        newest = self._newest
        if newest is not None and newest.number >= number:
            return newest
        if member not in self._given and self.number < number:
            raise ContributionLost(
                f"average {number} of run {self._run} has no ends of member {member} here (the server was "
                "restarted): give them again"
            )
        return None

    def close_if(self, awaited: Awaited) -> bool:
        """Average what was given, where nobody else is waited for; False where it waits on."""
        if not awaited.is_complete or not self._lock.acquire(blocking=False):
            return False
        try:
            given = dict(sorted(self._given.items()))
            if not given or not awaited.names <= given.keys():
                return False
            self._require_open()
            self._close(given, awaited.version)
        finally:
            self._lock.release()
        return True

    def missing(self, awaited: Awaited) -> str:
        """Who has not given yet, in words."""
        names = ", ".join(sorted(awaited.names - self._given.keys())) or "members that have not joined"
        return f"average {self.number + 1} of run {self._run}'s ends still waits for {names}: ask again"

    def end(self) -> None:
        """The run is closed: what it held is let go."""
        with self._lock:
            held = sum(each.nbytes for each in self._given.values())
            self._budget.give_back(held + (0 if self._newest is None else self._newest.nbytes))
            self._given, self._newest, self._is_over = {}, None, True

    def _require_open(self) -> None:
        if self._is_over:
            raise RunLost(f"run {self._run} was closed: join it again")

    def _close(self, given: Mapping[str, GivenEnds], version: int) -> None:
        each = list(given.values())
        mean = mean_of(self._share.rule, [ends.weights for ends in each], [ends.weight for ends in each])
        average = self._average(mean, len(each), version, each[0].frozen)
        room = average.nbytes - (0 if self._newest is None else self._newest.nbytes)
        self._budget.take(room)
        try:
            self._keep(average)
        except Exception:
            self._budget.give_back(room)
            raise
        self._budget.give_back(sum(ends.nbytes for ends in each))
        self._newest, self._given = average, {}
        log.info(
            "ends averaged",
            run=self._run,
            number=average.number,
            members=[*given],
            aggregation_residual=round(mean.aggregation_residual, 9),
        )

    def _average(self, mean: Mean, members: int, version: int, frozen: int) -> EndsAverage:
        before = {} if self._newest is None else self._newest.residuals
        return EndsAverage(
            self.number + 1,
            version + self._share.every,
            members,
            mean.aggregation_residual,
            frozen,
            mean.weights,
            mean.residual,
            added(before, mean.residual),
        )

    def _keep(self, average: EndsAverage) -> None:
        if self._folder is None:
            return
        if self._disk is None:
            average.write(self._folder)
            return
        what = f"average {average.number} of run {self._run}'s ends"
        with self._disk.reserved(self._folder / f"{FILE}.new", average.file_bytes, what):
            average.write(self._folder)

    def _require_fitting(self, given: GivenEnds) -> None:
        if not 0 <= given.weight <= MAX_WEIGHT:
            raise MessageError(f"ends that count {given.weight}: it must lie between 0 and {MAX_WEIGHT:g}")
        _require_adapter(given.weights, self._ranks, without_a=self._share.rule == FFA)
        for shapes, frozen in self._others():
            if {name: each.shape for name, each in given.weights.items()} != shapes:
                raise AdapterError(
                    f"the ends are not of the shapes that the other members of run {self._run} have: load "
                    "the model with their lora=, freeze= and split"
                )
            if given.frozen != frozen:
                raise AdapterError(
                    f"the frozen A matrices are not those of the other members of run {self._run}: load the "
                    "model with their seed=, and all from the same adapter or from none"
                )

    def _others(self) -> list[tuple[Mapping[str, torch.Size], int]]:
        """What ends of this run look like, where there are some."""
        known = self._newest or next(iter(self._given.values()), None)
        return [] if known is None else [({n: each.shape for n, each in known.weights.items()}, known.frozen)]


def _require_adapter(weights: Mapping[str, Tensor], ranks: set[int], *, without_a: bool) -> None:
    """Raises AdapterError where these are no LoRA weights of such ranks, in float32, all of them numbers."""
    if not weights:
        raise AdapterError("there are no ends to average: train bottom or top by an adapter")
    for name, weight in weights.items():
        if not NAME.fullmatch(name) or weight.ndim != 2 or weight.dtype != torch.float32:
            raise AdapterError(
                f"{name[:80]!r} of {list(weight.shape)} in {weight.dtype} is no LoRA weight as it is averaged"
                " (a module's lora_A or lora_B, two dimensions, float32): leave it out"
            )
        is_a = name.endswith(A)
        module = name.removesuffix(A if is_a else B)
        partner = weights.get(module + (B if is_a else A))
        rank = weight.shape[0 if is_a else 1]
        if is_a if without_a else partner is None or partner.shape[1 if is_a else 0] != rank:
            raise AdapterError(
                f"{module[:80]} has factors that do not make one adapter: give A and B of one rank"
            )
        if rank not in ranks:
            raise AdapterError(f"{module[:80]} has rank {rank}, the run has {sorted(ranks)}: use its lora=")
        if not bool(torch.isfinite(weight).all()):
            raise AdapterError(
                f"{name[:80]} has values that are no finite numbers, which an average would give to all: "
                "go back to a checkpoint, with a smaller learning rate"
            )
