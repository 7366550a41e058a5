"""Clients as processes that train what they are told, and a look at their run's adapter meanwhile."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _kill import zygote
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from splitlearn import AutoSplitModelForCausalLM, held_out_loss
from splitlearn.client.calls import describe
from splitlearn.client.grpc_transport import GrpcTransport
from splitlearn.client.member_key import client_key
from splitlearn.client.training import plan_run
from splitlearn.config import ClientConfig
from splitlearn.engine.ledger import read, rounds
from splitlearn.errors import ContributionLost, SplitLearnError, StaleGradient
from splitlearn.model.lora import ADAPTER, add_lora, settings_of, weights_of
from splitlearn.vocabulary import CohortSettings, OptimizerSettings
from splitlearn.wire.frames import FrameFormat
from splitlearn.wire.handshake import ModelIdentity

SEED, CONNECT_S, WAIT_S, POLL_S = 0, 10.0, 900.0, 0.2
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
FROZEN = ("bottom", "top")
CLIENTS, SLOWNESS, SINGLE = 5, 10.0, "single"
Weights = dict[str, torch.Tensor]
Point = tuple[float, float]
"""Tokens that were merged, and the held-out loss then."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a client trains: `rows` of its texts (n, T) a step; the rate falls to 0 by the last of `steps`."""

    model: Path
    address: str
    run: str
    cohort: CohortSettings
    name: str
    key: Path
    texts: torch.Tensor
    rows: int
    steps: int
    rate: float
    slowness: float = 1.0
    """So many times its compute time is what a step takes it."""
    seconds: float = 0.0
    """No step is begun after so many; 0 lets it do them all."""

    def batch(self, step: int) -> torch.Tensor:
        """Its texts in turn, from the first again after the last."""
        first = (step - 1) * self.rows
        return self.texts[[place % len(self.texts) for place in range(first, first + self.rows)]]


@dataclass(frozen=True, slots=True)
class Finished:
    """Steps that were done, and why there are no more of them."""

    steps: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The trunk's adapter at a version, so many seconds after the start."""

    version: int
    seconds: float
    weights: Weights


# ---------------------------------------------------------------- in a client's process


def work(pipe: Any) -> None:
    """One job after the other, until there is none."""
    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        split = None
        try:
            split = _join(job)
            pipe.send("ready")
            pipe.recv()
            pipe.send(Finished(_train(split, job)))
        except SplitLearnError as error:
            pipe.send(Finished(0, f"{type(error).__name__}: {error.message}"))
        pipe.recv()  # until then the adapter is there to be looked at
        if split is not None:
            split.trunk.close_run()
            split.close()


def _join(job: Job) -> Any:
    shared: dict[str, Any] = {} if job.cohort.is_private else {"cohort": job.cohort, "member": job.name}
    split = AutoSplitModelForCausalLM.from_pretrained(
        job.model,
        trunk=job.address,
        dtype="float32",
        lora=LORA,
        freeze=FROZEN,
        run=job.run,
        seed=SEED,
        member_key=job.key,
        **shared,
    )
    plan_run(split.trunk, OptimizerSettings(learning_rate=job.rate))
    _ = split.train().trunk.run
    return split


def _train(split: Any, job: Job) -> int:
    until = time.monotonic() + (job.seconds or WAIT_S)
    done = 0
    while done < job.steps and time.monotonic() < until:
        done += 1
        _step(split, job, done)
    split.trunk.leave()
    return done


def _step(split: Any, job: Job, step: int) -> None:
    """Computed again where the trunk lost it or it was too old."""
    ids, rate = job.batch(step), job.rate * (1 - (step - 1) / job.steps)
    for _ in range(100):
        try:
            began = time.monotonic()
            split(ids, labels=ids, use_cache=False).loss.backward()
            time.sleep((job.slowness - 1) * (time.monotonic() - began))
            split.trunk.step(learning_rate=rate, weight=float(ids[:, 1:].numel()))
            return
        except (ContributionLost, StaleGradient):
            continue
    raise SystemExit(f"step {step} of {job.name} was always too old")


# ---------------------------------------------------------------- from outside


class HeldOut:
    """The whole model, whose trunk takes on a run's adapter to be measured."""

    def __init__(self, model: Path, rows: torch.Tensor) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        add_lora(self._model, settings_of(LORA, self._model.config.model_type), ADAPTER, SEED)
        self._own = weights_of(self._model, ADAPTER)
        self._batches = [{"input_ids": each, "labels": each} for each in rows.split(6)]

    @torch.no_grad()
    def loss(self, weights: Weights) -> float:
        for name, weight in weights.items():
            self._own[name].copy_(weight)
        return held_out_loss(self._model, self._batches)


@dataclass(slots=True)
class Clients:
    """Processes that are started once and train many runs."""

    processes: list[Any] = field(default_factory=list)
    pipes: list[Any] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def started(cls, count: int) -> Iterator[Clients]:
        context, clients = zygote(), cls()
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            clients.processes.append(process)
            clients.pipes.append(ours)
        try:
            yield clients
        finally:
            clients._stop()

    def train(self, jobs: Sequence[Job], every_s: float) -> Trained:
        """Each job by a process of its own; the first one's adapter is looked at now and then."""
        pipes = self.pipes[: len(jobs)]
        for pipe, job in zip(pipes, jobs, strict=True):
            pipe.send(job)
        ended = [_receive(pipe) for pipe in pipes]
        if any(isinstance(each, Finished) for each in ended):
            raise SystemExit(f"a client could not begin: {ended}")
        with looking(jobs[0]) as wire:
            found = self._watch(pipes, jobs, wire, every_s)
        if not jobs[0].cohort.is_private:
            found.finals = {jobs[0].run: found.snapshots[-1].weights}
        for job in jobs if not found.finals else ():
            with looking(job) as wire:
                found.finals[job.run] = dict(wire.download_adapter(job.run).weights)
        for pipe in pipes:
            pipe.send("end")
        return found

    def _watch(self, pipes: list[Any], jobs: Sequence[Job], wire: Any, every_s: float) -> Trained:
        """A run of limited seconds ends for the watch when they are over, whoever still waits."""
        limit, found, working = jobs[0].seconds, Trained(), dict(zip(pipes, jobs, strict=True))
        found.look(wire, jobs[0].run, 0.0)
        for pipe in pipes:
            pipe.send("go")
        began = time.monotonic()
        while working:
            wait = min(every_s, limit - (time.monotonic() - began)) if limit else every_s
            ready = multiprocessing.connection.wait(list(working), max(wait, POLL_S / 10))
            for pipe in ready:
                told = pipe.recv()
                if told.error:
                    raise SystemExit(f"a client gave up: {told.error}")
                found.steps[working.pop(pipe).name] = told.steps
            passed = time.monotonic() - began
            if passed > WAIT_S:
                raise SystemExit(f"nothing ended within {WAIT_S:g} s")
            if not limit or not found.seconds:
                found.look(wire, jobs[0].run, passed)
            if limit and passed >= limit and not found.seconds:
                found.seconds = passed
        found.seconds = found.seconds or time.monotonic() - began
        return found

    def _stop(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


@dataclass(slots=True)
class Trained:
    """What came of a run: how long it took, each client's steps, and adapters."""

    seconds: float = 0.0
    steps: dict[str, int] = field(default_factory=dict)
    snapshots: list[Snapshot] = field(default_factory=list)
    finals: dict[str, Weights] = field(default_factory=dict)
    """The last adapter of each run."""

    def look(self, wire: Any, run: str, passed: float) -> None:
        """Keep the adapter where it has changed; the last look of all sees the last version."""
        there = wire.download_adapter(run)
        if not self.snapshots or there.version != self.snapshots[-1].version:
            self.snapshots.append(Snapshot(there.version, passed, dict(there.weights)))


@contextlib.contextmanager
def looking(job: Job) -> Iterator[Any]:
    """A connection of the parent's with this client's key, to which the server shows what is the client's."""
    facts = describe(job.address, CONNECT_S)
    layers = facts.bottom_layers, facts.trunk_layers, facts.top_layers
    identity = ModelIdentity(facts.config_hash, facts.weights_hash, *layers)
    wire = GrpcTransport(job.address, identity, ClientConfig(), FrameFormat(), client_key(job.key))
    try:
        yield wire
    finally:
        wire.close()


def _receive(pipe: Any) -> Any:
    if not pipe.poll(WAIT_S):
        raise SystemExit(f"a client said nothing for {WAIT_S:g} s")
    return pipe.recv()


def tokens_by_version(state: Path, run: str) -> dict[int, float]:
    """How many learned tokens are in the adapter at each of its versions, as the ledger has them."""
    (ledger,) = state.glob(f"**/{run}/ledger.jsonl")
    # Its last line may be half written while others still train.
    whole_lines = ledger.read_text().split("\n")[:-1]
    total, found = 0.0, {}
    for each in rounds(read(whole_lines)):
        total += sum(part.weight for part in each.parts)
        found[each.version] = total
    return found
