"""The two sides of a training run as processes that can be killed at a chosen moment and begun again.

They are forked from a process that has imported everything and does nothing else, so that a start costs a
fraction of a second: torch's and gRPC's threads come after the fork.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments

from splitlearn import AutoSplitModelForCausalLM, SplitTrainer, TrunkServer
from splitlearn.errors import SplitLearnError
from splitlearn.training.batches import PaddedBatch
from splitlearn.training.checkpoint import whole_checkpoints

STEPS, SAVE_STEPS = 30, 5
ROWS, ACCUMULATION, EXAMPLES = 2, 2, 38
"""19 batches an epoch, so that each ends with a step of one microbatch; some checkpoints lie within one."""
EVALUATED = 8
WAIT_S = 120.0
KILLED = {"client": ("client",), "server": ("server",), "both": ("server", "client")}
IMPORTED_ONCE = ("splitlearn.testing", "splitlearn.training.trainer", "transformers.models.llama")
Weights = dict[str, torch.Tensor]


def zygote() -> Any:
    """Where processes are forked from; started with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED_ONCE))
    return context


# ---------------------------------------------------------------- in the processes


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained, and with which random numbers; with an evaluation before each save, or without."""

    model: Path
    seed: int
    evaluates: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """What a client is started with."""

    training: Training
    address: str
    output: Path
    run: str
    resume: bool


def serve(
    log: Path,
    told: Connection,
    model: Path,
    port: int,
    state_dir: Path,
    runs: Mapping[str, float] = MappingProxyType({}),
) -> None:
    _write_to(log)
    sessions = {"session_tokens": 64, "kv_budget_bytes": 8 << 20}
    with TrunkServer(
        model, port=port, device="cpu", dtype="float32", state_dir=state_dir, sessions=sessions, runs=runs
    ) as server:
        told.send(Listening(server.address))
        started_by = multiprocessing.parent_process()
        assert started_by is not None
        started_by.join()


def train(log: Path, told: Connection, job: Job) -> None:
    """One training as its user writes it; at the end the whole adapter lies in the output folder."""
    _write_to(log)
    seed = job.training.seed
    try:
        model = AutoSplitModelForCausalLM.from_pretrained(
            job.training.model,
            trunk=job.address,
            lora=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear"),
            run=job.run,
            seed=seed,
            dtype=torch.float32,
        )
        trainer = SplitTrainer(
            model=model,
            args=_arguments(job),
            train_dataset=_examples(seed),
            eval_dataset=_examples(seed)[:EVALUATED],
            data_collator=PaddedBatch(0),
            callbacks=[_Reports(told)],
        )
        trainer.train(resume_from_checkpoint=True if job.resume else None)
        save_file(model.adapter_weights(), _result(job.output))
        model.close()
    except SplitLearnError as error:
        told.send(Failed(time.monotonic(), type(error).__name__, error.message))
    else:
        told.send(Done())


class _Reports(TrainerCallback):
    def __init__(self, told: Connection) -> None:
        self._told = told

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._told.send(Stepped(time.monotonic(), state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._told.send(Saved(time.monotonic(), state.global_step))


def _arguments(job: Job) -> TrainingArguments:
    return TrainingArguments(
        str(job.output),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        save_steps=SAVE_STEPS,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        eval_strategy="steps" if job.training.evaluates else "no",
        eval_steps=SAVE_STEPS,
        seed=job.training.seed,
    )


def _examples(seed: int) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(3, 128, (int(torch.randint(8, 24, (), generator=draw)),), generator=draw).tolist()
        for _ in range(EXAMPLES)
    ]
    return [{"input_ids": row, "labels": row} for row in rows]


def _write_to(log: Path) -> None:
    torch.set_num_threads(1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def _result(output: Path) -> Path:
    return output / "adapter.safetensors"


# ---------------------------------------------------------------- what they tell


@dataclass(frozen=True, slots=True)
class Listening:
    address: str


@dataclass(frozen=True, slots=True)
class Stepped:
    at: float
    step: int


@dataclass(frozen=True, slots=True)
class Saved:
    at: float
    step: int


@dataclass(frozen=True, slots=True)
class Done:
    """The adapter is in the output folder."""


@dataclass(frozen=True, slots=True)
class Failed:
    at: float
    kind: str
    message: str


# ---------------------------------------------------------------- from outside


@dataclass(slots=True)
class Side:
    """One process, and what it has told so far."""

    process: Any
    pipe: Connection
    told: list[Any] = field(default_factory=list)

    def until(self, is_it: Callable[[Any], bool]) -> Any:
        """The first message that is it, or the one that it ended with, or None where it ended without one."""
        for message in self._messages():
            if is_it(message) or self._has_ended:
                return message
        return None

    def end(self) -> Any:
        """How it ended: `Done`, `Failed`, or None where it was killed or broke."""
        return self.told[-1] if self._has_ended else self.until(lambda message: False)

    @property
    def step(self) -> int:
        """The last that it told of."""
        return max((each.step for each in self.told if isinstance(each, Stepped)), default=0)

    @property
    def first_step(self) -> int:
        return min((each.step for each in self.told if isinstance(each, Stepped)), default=STEPS + 1)

    @property
    def _has_ended(self) -> bool:
        return bool(self.told) and isinstance(self.told[-1], Done | Failed)

    def _messages(self) -> Iterator[Any]:
        while True:
            if not self.pipe.poll(WAIT_S):
                raise SystemExit(f"{self.process.name} said nothing for {WAIT_S:g} s after {self.told[-1:]}")
            try:
                self.told.append(self.pipe.recv())
            except (EOFError, OSError):
                return
            yield self.told[-1]


class Sides:
    """Server and client of one run, with what they leave on disk: state_dir there, output here."""

    def __init__(self, context: Any, training: Training, folder: Path) -> None:
        self._context, self._training = context, training
        self.output, self._state_dir = folder / "output", folder / "state"
        self.output.mkdir(parents=True)
        self.logs = folder
        self._port = _free_port()
        self._running: dict[str, Side] = {}
        self._numbers = count(1)

    def start_server(self) -> None:
        server = self._start("server", serve, self._training.model, self._port, self._state_dir)
        if not isinstance(server.until(lambda message: True), Listening):
            raise SystemExit(f"the server did not start: see {self.logs}")

    def start_client(self, *, resume: bool, run: str = "run") -> Side:
        address = f"127.0.0.1:{self._port}"
        return self._start("client", train, Job(self._training, address, self.output, run, resume))

    def kill(self, *names: str) -> None:
        """SIGKILL, to each at once; returns when they are dead."""
        for name in names:
            self._running[name].process.kill()
        for name in names:
            self._running[name].process.join(WAIT_S)

    @property
    def has_checkpoint(self) -> bool:
        return bool(whole_checkpoints(self.output))

    def adapter(self) -> Weights:
        return load_file(_result(self.output))

    def _start(self, name: str, target: Callable[..., None], *arguments: Any) -> Side:
        pipe, theirs = self._context.Pipe(duplex=False)
        log = self.logs / f"{name}-{next(self._numbers)}.log"
        process = self._context.Process(target=target, args=(log, theirs, *arguments), name=name, daemon=True)
        process.start()
        theirs.close()
        self._running[name] = Side(process, pipe)
        return self._running[name]


@contextmanager
def sides(context: Any, training: Training, folder: Path) -> Iterator[Sides]:
    both = Sides(context, training, folder)
    both.start_server()
    try:
        yield both
    finally:
        both.kill(*both._running)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
