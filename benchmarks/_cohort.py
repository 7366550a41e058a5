"""A cohort of real processes that can be killed, and what its ledger must say in the end.

Bottom and top are frozen, so that a member has nothing to lose but the step it is at; its batches are drawn
from its name and the step's number.
"""

from __future__ import annotations

import multiprocessing.connection
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import xxhash
from _kill import WAIT_S, Listening, _free_port, _write_to, serve
from peft import LoraConfig

from splitlearn import AutoSplitModelForCausalLM
from splitlearn.client.training import plan_run, prepare_training
from splitlearn.engine.checkpoint import RunSnapshot, RunStore
from splitlearn.engine.contribution import Gradients
from splitlearn.engine.ledger import read, rounds
from splitlearn.engine.run import Run
from splitlearn.engine.trunk_state import AdapterVersion
from splitlearn.errors import ContributionLost, SplitLearnError, StaleGradient
from splitlearn.monitor.events import Event
from splitlearn.testing import split_over_loopback
from splitlearn.testing.replay import replay
from splitlearn.vocabulary import CohortSettings, OptimizerSettings

RUN, SEED, RATE = "cohort", 1, 1e-2
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")
FROZEN = ("bottom", "top")
RUNS = {"member_lease_s": 2.0}
ADAMW = OptimizerSettings(learning_rate=RATE)


@dataclass(frozen=True, slots=True)
class Told:
    """What a member has done: so many of its steps."""

    member: str
    step: int


@dataclass(frozen=True, slots=True)
class Ended:
    member: str
    error: str = ""


def batch(member: str, step: int, vocabulary: int = 128) -> torch.Tensor:
    """Rows of a length of the member's own, so that members weigh differently."""
    seed = xxhash.xxh3_64_intdigest(f"{member}/{step}".encode()) >> 1
    draw = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(6, 20, (), generator=draw))
    return torch.randint(3, vocabulary, (2, tokens), generator=draw)


# ---------------------------------------------------------------- in the processes


def work(
    log: Path,
    told: Connection,
    model: Path,
    address: str,
    cohort: CohortSettings,
    name: str,
    key: Path,
    steps: int,
) -> None:
    """One member, until it has done so many steps."""
    _write_to(log)
    try:
        split = AutoSplitModelForCausalLM.from_pretrained(
            model,
            trunk=address,
            dtype="float32",
            lora=LORA,
            freeze=FROZEN,
            run=RUN,
            seed=SEED,
            cohort=cohort,
            member=name,
            member_key=key,
        )
        plan_run(split.trunk, ADAMW)
        split.train()
        for step in range(split.trunk.run.step + 1, steps + 1):
            compute(split, name, step)
            told.send(Told(name, step))
        split.trunk.close_run()
        split.close()
        told.send(Ended(name))
    except SplitLearnError as error:
        told.send(Ended(name, f"{type(error).__name__}: {error.message}"))


def compute(split: Any, name: str, step: int) -> None:
    """One step, again where the trunk lost it or it was too old."""
    until = time.monotonic() + WAIT_S
    ids = batch(name, step)
    while True:
        try:
            split(ids, labels=ids, use_cache=False).loss.backward()
            split.trunk.step(learning_rate=RATE, weight=float(ids.numel()))
            return
        except (ContributionLost, StaleGradient):
            if time.monotonic() > until:
                raise


# ---------------------------------------------------------------- from outside


@dataclass(slots=True)
class Cohort:
    """A server and its members as processes."""

    context: Any
    model: Path
    folder: Path
    settings: CohortSettings
    steps: int
    told: dict[str, int] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    _pipes: dict[str, Any] = field(default_factory=dict)
    _processes: dict[str, Any] = field(default_factory=dict)
    _numbers: Any = field(default_factory=lambda: count(1))
    _port: int = 0

    def start_server(self) -> None:
        self._port = self._port or _free_port()
        pipe = self._start("server", serve, self.model, self._port, self.folder / "state", RUNS)
        if not pipe.poll(WAIT_S) or not isinstance(pipe.recv(), Listening):
            raise SystemExit(f"the server did not start: see {self.folder}")

    def start_member(self, name: str) -> None:
        address, key = f"127.0.0.1:{self._port}", self.folder / "keys" / name
        self.ended.pop(name, None)
        self._pipes[name] = self._start(name, work, self.model, address, self.settings, name, key, self.steps)

    def kill(self, name: str) -> None:
        """SIGKILL; returns when it is dead."""
        self._processes[name].kill()
        self._processes[name].join(WAIT_S)
        self._pipes.pop(name, None)

    def until(self, step: int, names: Sequence[str] | None = None) -> None:
        """Wait until all of these have told of this step, or have ended."""
        names = list(names or self._pipes)
        while any(self.told.get(name, 0) < step and name not in self.ended for name in names):
            ready = multiprocessing.connection.wait(list(self._pipes.values()), WAIT_S)
            if not ready:
                raise SystemExit(f"nobody said anything for {WAIT_S:g} s: {self.told}, see {self.folder}")
            for name, pipe in list(self._pipes.items()):
                if pipe in ready:
                    self._take(name, pipe)

    def stop(self) -> None:
        for name in list(self._processes):
            self.kill(name)

    def store(self) -> RunStore:
        (runs,) = (self.folder / "state").glob("*/runs")
        return RunStore(runs)

    def _take(self, name: str, pipe: Connection) -> None:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            self.ended.setdefault(name, "died")
            del self._pipes[name]
            return
        if isinstance(message, Told):
            self.told[name] = message.step
        else:
            self.ended[name] = message.error
            del self._pipes[name]

    def _start(self, name: str, target: Any, *arguments: Any) -> Connection:
        pipe, theirs = self.context.Pipe(duplex=False)
        log = self.folder / f"{name}-{next(self._numbers)}.log"
        process = self.context.Process(target=target, args=(log, theirs, *arguments), name=name, daemon=True)
        process.start()
        theirs.close()
        self._processes[name] = process
        return pipe


def audit(events: Sequence[Event], told: dict[str, int]) -> list[str]:
    """What is wrong: a round lost or twice, a member's step twice, or lost though its member was told."""
    closed = list(rounds(events))
    wrong = [f"round {at} is numbered {each.round}" for at, each in enumerate(closed, 1) if each.round != at]
    parts = Counter((part.member, part.step) for each in closed for part in each.parts)
    wrong += [
        f"step {step} of {member} counts {times} times"
        for (member, step), times in parts.items()
        if times > 1
    ]
    settled = set(parts) | {
        (each.member, each.step) for each in events if each.kind in ("dropped", "skipped", "kept")
    }
    wrong += [
        f"step {step} of {member} was told and is in no round"
        for member, last in told.items()
        for step in range(1, last + 1)
        if (member, step) not in settled
    ]
    return wrong


def replayed(model: Path, events: Sequence[Event], settings: CohortSettings) -> dict[str, torch.Tensor]:
    """The adapter that this ledger makes, computed again in this process."""
    torch.set_num_threads(1)
    with split_over_loopback(model, dtype="float32") as split:
        prepare_training(split, LORA, "replayed", FROZEN, SEED)
        plan_run(split.trunk, ADAMW)
        split.train()
        engine, trunk = split.trunk.transport._engine, split.trunk
        first = engine.runs.do(trunk.run.name, Run.snapshot).result(WAIT_S)

        def gradients_of(member: str, step: int, version: AdapterVersion) -> Gradients:
            return _gradients(split, first, batch(member, step), member, step, version)

        weights = {name: weight.clone() for name, weight in first.weights.items()}
        run = Run(RUN, replace(first.settings, cohort=settings), None, weights, b"")
        replay(events, run, gradients_of)
        return dict(run.snapshot().weights)


def _gradients(
    split: Any, first: RunSnapshot, ids: torch.Tensor, member: str, step: int, version: AdapterVersion
) -> Gradients:
    engine, trunk = split.trunk.transport._engine, split.trunk
    weights = {name: weight.detach() for name, weight in version.weights.items()}
    snapshot = replace(first, weights=weights, step=step - 1)
    engine.runs.do(trunk.run.name, lambda run: run.restore(snapshot)).result(WAIT_S)
    trunk.run.step, trunk.run.member = step - 1, member
    split(ids, labels=ids, use_cache=False).loss.backward()
    found = engine.runs.do(trunk.run.name, Run.gradients).result(WAIT_S)
    trunk.run._next_microbatch = trunk.run._unapplied = 0
    return list(found.values())


def events_of(store: RunStore) -> list[Event]:
    return list(read(store.ledger(RUN)))
