"""The thread that owns the device: choose which waiting steps run together, run them, answer."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

import structlog
import torch
from torch import Tensor

from splitlearn.config import BatchingConfig, RunConfig, SessionConfig
from splitlearn.engine.adapter_table import AdapterTable
from splitlearn.engine.batch import run_batch
from splitlearn.engine.batch_plan import BatchCounts
from splitlearn.engine.batcher import Batcher
from splitlearn.engine.checkpoint import RunSnapshot
from splitlearn.engine.kv_cache import KvCache
from splitlearn.engine.ready_step import ReadyRunStep, ReadyStep
from splitlearn.engine.run import Run
from splitlearn.engine.run_steps import RunSteps
from splitlearn.engine.run_table import RunTable
from splitlearn.engine.runner import Ran, Runner, measure_layers, timed
from splitlearn.engine.session import require_room
from splitlearn.engine.session_table import SessionTable
from splitlearn.engine.step import Step
from splitlearn.engine.step_queue import StepQueue
from splitlearn.engine.tape import Tape
from splitlearn.engine.trunk_state import AdapterVersion, TrunkState
from splitlearn.errors import (
    MessageError,
    ResourceExhausted,
    SessionLost,
    SplitLearnError,
    StepOutOfOrder,
    StepTimeout,
    TrunkDraining,
    TrunkFailed,
)
from splitlearn.model.segments import TrunkSegment
from splitlearn.vocabulary import Phase, StepKey, Timings
from splitlearn.wire.messages import (
    AdapterMessage,
    AnswerMessage,
    CloseMessage,
    ForkMessage,
    OpenRun,
    RunFacts,
    RunStepMessage,
    StepMessage,
)

EXPIRY_CHECK_S = 0.5
STOP_S = 30.0
Result = TypeVar("Result")
log = structlog.get_logger("splitlearn.engine")


class Engine:
    """Others send it steps and await futures; it alone touches the trunk, its KV cache and its sessions."""

    def __init__(
        self,
        trunk: TrunkSegment,
        batching: BatchingConfig,
        sessions: SessionConfig,
        runs: RunConfig | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        runs = runs or RunConfig()
        self.trunk = trunk
        self.kv = _kv_cache(trunk, sessions)
        self.ran = BatchCounts()
        self._max_positions = trunk.max_positions
        self._state = state = TrunkState(trunk, compiled=compiled)
        self._runner = Runner(trunk, self.kv, state)
        self.tape = Tape(runs.tape_budget_bytes)
        self._adapters = AdapterTable(state, runs.max_adapters)
        self._runs = RunTable(state, self.tape, runs, self._adapters)
        self._run_steps = RunSteps(
            trunk, state, self.tape, lease_s=runs.tape_lease_s, staleness_limit=runs.staleness_limit
        )
        self._sessions = SessionTable(self.kv, sessions, trunk.max_positions, self._runs.adapter)
        self._batcher = Batcher(batching, batched=trunk.batched)
        self._wait_s = batching.wait_ms / 1000
        self._queue = StepQueue()
        self._ready: list[ReadyStep | ReadyRunStep] = []
        self.lease_s = sessions.lease_s
        self.failure: Exception | None = None
        self.on_failure: Callable[[], object] = lambda: None
        self._stopping = threading.Event()
        self._draining = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # Called from any thread.

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the batch that runs; what still waits is answered with TrunkDraining."""
        self._stopping.set()
        self._queue.shut()
        self._thread.join(STOP_S)

    def drain(self) -> None:
        """Open no further session; those that are open go on."""
        self._draining.set()

    def submit(self, client: bytes, message: StepMessage | RunStepMessage) -> Future[AnswerMessage]:
        """The future of this step's answer; an error arrives as an answer too."""
        step: Step[Any] = Step(client, message)
        future = step.wait()
        if not self._queue.put(step):
            step.fail(_stopped())
        return future

    def fork(self, client: bytes, message: ForkMessage) -> Future[None]:
        self._refuse_when_draining()
        return self._ask(lambda: self._sessions.fork(client, message, time.monotonic()))

    def close(self, client: bytes, message: CloseMessage) -> Future[None]:
        return self._ask(lambda: self._sessions.close(client, message))

    def leave(self, client: bytes) -> Future[None]:
        """Nobody of this client is connected any more: keep its sessions for a short while only."""
        return self._ask(lambda: self._sessions.shorten_leases(client, time.monotonic()))

    def open_run(self, client: bytes, asked: OpenRun) -> Future[RunFacts]:
        self._refuse_when_draining()
        return self._ask(lambda: self._runs.open(client, asked).facts())

    def join_run(self, client: bytes, name: str) -> Future[RunFacts]:
        return self._ask(lambda: self._runs.join(client, name).facts())

    def restore_run(self, client: bytes, snapshot: RunSnapshot) -> Future[RunFacts]:
        self._refuse_when_draining()
        return self._ask(lambda: self._runs.restore(client, snapshot).facts())

    def run_snapshot(self, key: StepKey) -> Future[RunSnapshot]:
        """The run as it stands, for the one incarnation that trains it.

        Raises (in the future):
            RunLost, RunTakenOver, RunBroken: as for its steps.
        """
        return self._ask(lambda: self._runs.find(key).snapshot())

    def close_run(self, name: str) -> Future[RunFacts]:
        return self._ask(lambda: self._runs.close(name).facts())

    def run_facts(self) -> Future[list[RunFacts]]:
        return self._ask(lambda: [run.facts() for run in self._runs])

    def load_adapter(self, message: AdapterMessage) -> Future[AdapterVersion]:
        self._refuse_when_draining()
        return self._ask(lambda: self._adapters.load(message).version)

    def unload_adapter(self, name: str) -> Future[int]:
        """The bytes that this frees."""
        return self._ask(lambda: self._adapters.unload(name))

    def adapter(self, name: str) -> Future[AdapterMessage]:
        """The trunk's part of a run's adapter as it is now, for its members to take.

        Raises (in the future):
            RunLost: there is no such run; AccessDenied: it was opened with `allow_download` off.
        """
        return self._ask(lambda: self._runs.named(name).download())

    def with_run(self, name: str, do: Callable[[Run], Result]) -> Future[Result]:
        """Have something done with a run between two steps, on the engine's thread: keep it short."""
        return self._ask(lambda: do(self._runs.named(name)))

    @property
    def open_sessions(self) -> int:
        return len(self._sessions)

    @property
    def open_runs(self) -> int:
        return len(self._runs)

    # The engine's thread.

    def _loop(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
        except Exception as error:
            # What can fail for one client is caught there: this is the device, or a slip of ours.
            log.error("the engine failed and ends", exc_info=error)
            self.failure = error
            self.on_failure()
        finally:
            self._queue.shut()
            self._refuse_the_rest()

    def _turn(self) -> None:
        self._queue.wait(0 if self._ready else EXPIRY_CHECK_S)
        self._accept()
        if expired := self._sessions.expire(time.monotonic()):
            log.info("sessions expired", sessions=expired)
        if expired := self.tape.expire(time.monotonic()):
            log.info("forwards without a backward expired", forwards=expired)
        if names := self._runs.expire(time.monotonic()):
            log.warning("runs that nobody used were closed", runs=names)
        if self._ready:
            self._wait_for_company()
            self._run_next_batch()

    def _accept(self) -> None:
        for item in self._queue.take():
            if isinstance(item, Step):
                self._admit(item)
            else:
                item()

    def _admit(self, step: Step[Any]) -> None:
        try:
            if isinstance(step.message, RunStepMessage):
                self._ready.append(ReadyRunStep(step, self._runs.find(step.message.key)))
                return
            self._check_opening(step.message)
            if step.message.key.session == 0:
                self._admit_lone(step)
            else:
                self._admit_to_session(step)
        except Exception as error:
            step.fail(_explained(error))

    def _admit_lone(self, step: Step[StepMessage]) -> None:
        message = step.message
        if message.open or message.keep_positions is not None or message.select_rows is not None:
            raise MessageError("a step without a session has nothing to open, to keep or to select")
        require_room(message, 0, self.kv.slot_tokens, self._max_positions)
        self._ready.append(ReadyStep(step, None))

    def _admit_to_session(self, step: Step[StepMessage]) -> None:
        key = step.message.key
        session = self._sessions.enter(step.client, step.message, time.monotonic())
        if (running := session.running) is not None:
            if running.message.key != key:
                raise StepOutOfOrder(
                    f"step {key.step} came while step {running.message.key.step} of its session runs",
                    facts={"current_step": session.next_step},
                )
            running.waiting.extend(step.waiting)
        elif kept := self._sessions.kept_answer(session, key.step):
            step.answer(kept)
        else:
            self._sessions.check(session, step.message)
            session.running = step
            self._ready.append(ReadyStep(step, session))

    def _wait_for_company(self) -> None:
        until = time.monotonic() + self._wait_s
        while len(self._ready) < len(self._sessions) and (left := until - time.monotonic()) > 0:
            self._queue.wait(left)
            self._accept()

    def _run_next_batch(self) -> None:
        self._give_up_late_steps()
        if not self._ready:
            return
        started = time.monotonic()
        if isinstance(first := self._ready[0], ReadyRunStep):
            self._ready.remove(first)
            self._do(first, started)
            return
        batch = self._batcher.choose([each for each in self._ready if isinstance(each, ReadyStep)])
        self._ready = [waiting for waiting in self._ready if waiting not in batch]
        if prepared := [member for member in batch if self._prepare(member)]:
            self._run_or_split(prepared, started)

    def _give_up_late_steps(self) -> None:
        now = time.monotonic()
        for late in [r for r in self._ready if r.step.is_late(now) or r.step.is_cancelled]:
            self._ready.remove(late)
            if isinstance(late, ReadyStep):
                self._give_up(late)
            late.step.fail(StepTimeout("the step waited longer than its deadline and was not run: ask again"))

    def _prepare(self, member: ReadyStep) -> bool:
        """Bring the session into the state that its step starts from; a step that cannot is answered."""
        if member.session is None:
            return True
        try:
            if member.session.running is not member.step:
                raise SessionLost("the session was closed while this step waited")
            member.session.prepare(member.step.message, self.kv)
        except Exception as error:
            self._give_up(member)
            member.step.fail(_explained(error))
            return False
        return True

    def _run_or_split(self, batch: list[ReadyStep], started: float) -> None:
        """A batch that fails runs again one by one, so that one member's fault is not the others'."""
        try:
            plan, ran = run_batch(self._runner, batch, self.trunk.dtype)
        except Exception as error:
            if len(batch) > 1:
                log.warning("a batch failed and runs one by one", steps=len(batch), exc_info=error)
                for member in batch:
                    self._run_or_split([member], started)
            else:
                self._fail(batch[0], error)
        else:
            if plan is not None:
                self.ran.note(plan)
            rows = [member.step.message.rows for member in batch]
            for member, activation_BTD in zip(batch, torch.split(ran.activation_BTD, rows), strict=True):
                try:
                    self._answer(member, activation_BTD, ran, started)
                except Exception as error:
                    self._fail(member, error)

    def _do(self, member: ReadyRunStep, started: float) -> None:
        """A run's step; one that fails leaves the run as it was, so that it can be asked again, or broken."""
        step = member.step
        try:
            with timed(self.trunk.device) as clock:
                answer = self._run_steps.do(self._runs.find(step.message.key), step.message)
        except Exception as error:
            step.fail(_explained(error))
        else:
            queued_us = int((started - step.arrived_at) * 1e6)
            step.answer(replace(answer, timings=Timings(queued_us=queued_us, device_us=clock.us)))

    def _answer(self, member: ReadyStep, activation_BTD: Tensor, ran: Ran, started: float) -> None:
        message = member.step.message
        is_part = len(activation_BTD) < len(ran.activation_BTD)
        answer = AnswerMessage(
            message.key,
            # A part is copied: kept as a view, it would keep the whole batch's memory.
            activation_BTD.to(message.activation_BTD.dtype, copy=is_part),
            Timings(queued_us=int((started - member.step.arrived_at) * 1e6), device_us=ran.device_us),
        )
        if member.session is not None:
            # Kept before it leaves: a client that loses the reply asks for the same step again.
            self._sessions.advance(member.session, message.tokens, answer, time.monotonic())
        member.step.answer(answer)

    def _fail(self, member: ReadyStep, error: Exception) -> None:
        """The session's slots may be half written: it is lost, and its client told so."""
        try:
            if member.session is not None:
                self._sessions.drop(member.session)
        finally:
            member.step.fail(_explained(error))

    def _give_up(self, member: ReadyStep) -> None:
        """The step is not run; a session that it was to open is not kept for a client that left."""
        session = member.session
        if session is None or session.running is not member.step:
            return
        session.running = None
        if session.length == 0 and session.next_step == 1:
            self._sessions.drop(session)

    def _check_opening(self, message: StepMessage) -> None:
        if message.key.phase is not Phase.FORWARD:
            raise MessageError("a session knows forward steps only; the other phases belong to a run")
        if message.open is not None:
            self._refuse_when_draining()
            self._state.require_precision(message.open.precision)

    def _refuse_when_draining(self) -> None:
        if self._draining.is_set():
            raise TrunkDraining("the server is stopping and opens no new session: try another, or later")

    def _refuse_the_rest(self) -> None:
        for member in self._ready:
            member.step.fail(_stopped())
        self._ready.clear()
        for item in self._queue.take():
            if isinstance(item, Step):
                item.fail(_stopped())
            else:
                # A request answers its own future, with an error if need be.
                item()

    def _ask(self, work: Callable[[], Result]) -> Future[Result]:
        future: Future[Result] = Future()

        def request() -> None:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(_explained(error))

        if not self._queue.put(request):
            future.set_exception(_stopped())
        return future


def _kv_cache(trunk: TrunkSegment, config: SessionConfig) -> KvCache:
    tokens = min(config.session_tokens, trunk.max_positions or config.session_tokens)
    return KvCache(
        measure_layers(trunk),
        budget_bytes=config.kv_budget_bytes,
        slot_tokens=tokens,
        dtype=trunk.dtype,
        device=trunk.device,
    )


def _explained(error: Exception) -> SplitLearnError:
    """What a client is told; the cause of what nobody foresaw stays in the log."""
    if isinstance(error, SplitLearnError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return ResourceExhausted("the trunk's device ran out of memory at this step: use fewer rows")
    incident = uuid.uuid4().hex[:8]
    log.error("step failed", incident=incident, exc_info=error)
    return TrunkFailed(f"the trunk failed at this step; its log has the cause as incident {incident}")


def _stopped() -> TrunkDraining:
    return TrunkDraining("the server stopped before this step ran: try another, or later")
