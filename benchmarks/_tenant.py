"""One client that computes nothing: it trains, writes and sends prompts from random activations."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from splitlearn.client.calls import describe
from splitlearn.client.grpc_transport import GrpcTransport
from splitlearn.config import ClientConfig
from splitlearn.vocabulary import CohortSettings, LoraSettings, Phase, RunSettings, StepKey
from splitlearn.wire.frames import FrameFormat
from splitlearn.wire.handshake import ModelIdentity
from splitlearn.wire.messages import (
    CloseMessage,
    OpenRun,
    OpenSession,
    OptimizerStep,
    RunFacts,
    RunStepMessage,
    StepMessage,
)

CONNECT_S, STEP_S = 10.0, 600.0
RATE = 1e-4


class Tenant:
    """A client with its own connection, and so its own id."""

    def __init__(self, address: str) -> None:
        facts = describe(address, CONNECT_S)
        layers = facts.bottom_layers, facts.trunk_layers, facts.top_layers
        identity = ModelIdentity(facts.config_hash, facts.weights_hash, *layers)
        self.wire = GrpcTransport(address, identity, ClientConfig(), FrameFormat())
        self._hidden_size = facts.hidden_size
        self._sessions = itertools.count(1)

    def text(self, prompt_tokens: int, text_tokens: int) -> Iterator[None]:
        """A step of one token each time; cropped back to its prompt where it is full."""
        session, length = next(self._sessions), prompt_tokens
        self._ask(StepKey(session=session, step=1), prompt_tokens, open=OpenSession())
        for step in itertools.count(2):
            keep = None
            if length >= text_tokens:
                keep = length = prompt_tokens
            key = StepKey(session=session, step=step)
            self._ask(key, 1, keep_positions=keep, acked_through=step - 1)
            length += 1
            yield

    def prompts(self, tokens: int) -> Iterator[None]:
        """A new session's prompt each time."""
        while True:
            session = next(self._sessions)
            self._ask(StepKey(session=session, step=1), tokens, open=OpenSession())
            self.wire.close_session(CloseMessage(session))
            yield

    def training(
        self, name: str, lora: LoraSettings, rows: int, tokens: int, cohort: CohortSettings | None = None
    ) -> Iterator[RunFacts]:
        """A forward, a backward and an optimizer step each time; in a cohort as the member `name`."""
        settings = RunSettings(lora=lora, cohort=cohort or CohortSettings())
        run = self.wire.open_run(OpenRun(name, settings, member="" if cohort is None else name))
        activation_BTD = self._random(rows, tokens)
        for step in itertools.count(1):
            key = StepKey(run=run.number, incarnation=run.incarnation, step=step)
            for phase in (Phase.FORWARD, Phase.BACKWARD):
                asked = RunStepMessage(replace(key, phase=phase), activation_BTD, deadline_s=STEP_S)
                self.wire.run_step(asked)
            stepping = replace(key, phase=Phase.OPTIMIZER_STEP)
            step_now = OptimizerStep(1.0, RATE)
            self.wire.run_step(RunStepMessage(stepping, optimizer=step_now, deadline_s=STEP_S))
            yield run

    def _ask(self, key: StepKey, tokens: int, **how: Any) -> None:
        self.wire.step(StepMessage(key, self._random(1, tokens), deadline_s=STEP_S, **how))

    def _random(self, rows: int, tokens: int) -> Tensor:
        draw = torch.Generator().manual_seed(tokens)
        return torch.randn(rows, tokens, self._hidden_size, generator=draw)


class Neighbour:
    """A tenant that does all it can, each of its loops on a thread of its own, while it is let.

    Each loop goes round once at the beginning: what only its first round takes is over then.
    """

    def __init__(self, address: str, loops: Sequence[Callable[[Tenant], Iterator[object]]]) -> None:
        self.rounds = [0] * len(loops)
        self._tenant = Tenant(address)
        self._goes_on, self._ends = threading.Event(), threading.Event()
        self._busy = [threading.Lock() for _ in loops]
        self._loops = [loop(self._tenant) for loop in loops]
        for loop in self._loops:
            next(loop)
        self._threads = [threading.Thread(target=self._work, args=(n,)) for n in range(len(loops))]
        for each in self._threads:
            each.start()

    def go_on(self) -> None:
        self._goes_on.set()

    def rest(self) -> None:
        """Returns once nothing of its is under way."""
        self._goes_on.clear()
        for busy in self._busy:
            with busy:
                pass

    def end(self) -> None:
        self._ends.set()
        self._goes_on.set()
        for each in self._threads:
            each.join()
        self._tenant.wire.close()

    def _work(self, number: int) -> None:
        while self._goes_on.wait() and not self._ends.is_set():
            with self._busy[number]:
                next(self._loops[number])
                self.rounds[number] += 1


def step_times(text: Iterator[None], seconds: float) -> list[float]:
    """How long each step of a text took, for so long."""
    taken, until = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        next(text)
        taken.append(time.perf_counter() - began)
    return taken
