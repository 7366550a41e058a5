"""One client's process: the training that `splitlearn train` does, which tells how it gets on."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import TrainerCallback

from splitlearn.cli.cohort_options import KEY_FILE
from splitlearn.cli.fine_tuning import FineTuning, learnable
from splitlearn.cli.simulation.config import ClientTraining
from splitlearn.cli.simulation.reports import Activity, Does, Ended, Failed, Lost, Report, Stepped
from splitlearn.cli.train_arguments import loading_of
from splitlearn.client.split_model import AutoSplitModelForCausalLM
from splitlearn.errors import SplitLearnError, StepTimeout
from splitlearn.training.checkpoint import whole_checkpoints
from splitlearn.training.data import TrainingData
from splitlearn.vocabulary import CohortSettings

FAILED = 1


@dataclass(frozen=True, slots=True)
class Task:
    """What a client is started with, and begun again with."""

    model: str
    trunk: str
    training: ClientTraining
    cohort: CohortSettings
    member: str
    factor: float
    held_out: Path | None
    measures_before: bool
    tensorboard: Path
    patience_s: float
    """How long it waits for the others when it has done its steps."""


def be_client(task: Task, line: Connection, log: Path) -> None:
    """All of the process; it ends with its parent, and its output goes to the log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    Thread(target=_end_with_parent, daemon=True).start()
    _write_to(log)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(task.tensorboard)
    torch.set_num_threads(1)
    try:
        line.send(_trained(task, line))
    except SplitLearnError as error:
        print("error:", error.message, file=sys.stderr, flush=True)
        line.send(Failed(error.message))
        sys.exit(FAILED)


def _trained(task: Task, line: Connection) -> Ended:
    output = task.training.output
    settings = task.training.model_copy(update={"resume": bool(whole_checkpoints(output))})
    model = AutoSplitModelForCausalLM.from_pretrained(
        task.model,
        trunk=task.trunk,
        **loading_of(settings),
        cohort=task.cohort,
        member=task.member,
        member_key=output / KEY_FILE,
    )
    with closing(model):
        tuning = FineTuning(model, _data(task, settings), settings, has_bar=False)
        tuning.trainer.add_callback(Teller(line, model, task.factor))
        line.send(Does(Activity.MEASURING))
        done = tuning.run(
            measures_before=task.measures_before, trained_at=lambda: _wait_for_others(line, task.patience_s)
        )
        model.trunk.close_run()
    return Ended(done.steps, done.held_out_loss_before, done.held_out_loss_after)


class Teller(TrainerCallback):
    """Says what the client does, and makes it as slow as it is to be.

    A step's time is that from its beginning until its gradients are given: the trunk's answers are in it,
    the wait for a round is not.
    """

    def __init__(self, line: Connection, model: Any, factor: float) -> None:
        self._line, self._trunk, self._factor = line, model.trunk, factor
        self._began, self._tokens = time.perf_counter(), 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began, self._tokens = time.perf_counter(), 0
        self._say(Does(Activity.COMPUTING))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._factor > 1:
            self._say(Does(Activity.SLEEPING))
            time.sleep((self._factor - 1) * (time.perf_counter() - self._began))
        self._say(Does(Activity.GIVING))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        merged = self._trunk.run.last_merged
        self._say(
            Stepped(
                state.global_step,
                self._tokens,
                time.perf_counter() - self._began,
                None if merged is None else merged.staleness,
            )
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._say(Lost(float(logs["loss"])))

    def _count(self, model: Any, positional: Any, named: dict[str, Any]) -> None:
        if model.training and (ids := named.get("input_ids")) is not None:
            self._tokens += ids.numel()

    def _say(self, report: Report) -> None:
        self._line.send(report)


def _data(task: Task, settings: ClientTraining) -> TrainingData:
    """The client's own lines to learn; what it is measured on is everybody's."""
    own = learnable(task.model, settings)
    if task.held_out is None:
        return own
    measured = learnable(task.model, settings.model_copy(update={"data": [task.held_out]}))
    return replace(own, held_out=measured.train, held_out_examples=measured.train_examples)


def _wait_for_others(line: Connection, patience_s: float) -> None:
    """Until all have done their steps, so that everybody measures the same trunk."""
    line.send(Does(Activity.TRAINED))
    if not line.poll(patience_s):
        raise StepTimeout(f"the other clients were not done within {patience_s:g} s: raise deadline_s")
    line.recv()
    line.send(Does(Activity.MEASURING))


def _write_to(log: Path) -> None:
    """In front of what an earlier start has written, nothing is lost."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(FAILED)
