"""The thread that owns the device: choose which waiting steps run together, run them, answer."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import structlog
import torch

from splitlearn.config import BatchingConfig, CompileMode, QuotaConfig, RunConfig, SessionConfig
from splitlearn.engine.account import Accounts
from splitlearn.engine.adapter_bank import AdapterBank
from splitlearn.engine.adapter_table import AdapterTable
from splitlearn.engine.admission import Admission
from splitlearn.engine.batch_plan import BatchCounts
from splitlearn.engine.company import Company
from splitlearn.engine.decode_graphs import DecodeGraphs
from splitlearn.engine.failures import explained, stopped
from splitlearn.engine.pacing import Pacing
from splitlearn.engine.ready_step import Ready, ReadyRunStep, ReadyStep, Work
from splitlearn.engine.run_requests import RunRequests
from splitlearn.engine.run_steps import RunSteps
from splitlearn.engine.run_table import RunTable
from splitlearn.engine.runner import Runner, kv_cache_of, timed
from splitlearn.engine.scheduler import Scheduler
from splitlearn.engine.session import Session
from splitlearn.engine.session_moves import SessionMoves
from splitlearn.engine.session_steps import SessionSteps
from splitlearn.engine.session_table import SessionTable
from splitlearn.engine.step import Step
from splitlearn.engine.step_queue import StepQueue
from splitlearn.engine.tape import Tape
from splitlearn.engine.trunk_state import TrunkState
from splitlearn.errors import SettingError, StepTimeout
from splitlearn.model.devices import compile_mode
from splitlearn.model.segments import TrunkSegment
from splitlearn.vocabulary import Timings
from splitlearn.wire.messages import AnswerMessage, CloseMessage, ForkMessage, RunStepMessage, StepMessage

EXPIRY_CHECK_S = 0.5
STOP_S = 30.0
PREPARE_S = 1800.0
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
        compile: CompileMode = "off",
        quotas: QuotaConfig | None = None,
    ) -> None:
        runs, quotas = runs or RunConfig(), quotas or QuotaConfig()
        self.trunk = trunk
        compile = compile_mode(compile, trunk.device)
        graphed = compile != "off" and trunk.batched
        self.kv = kv_cache_of(trunk, sessions, spare=graphed)
        self._state = state = TrunkState(trunk, compiled=compile == "max")
        self.bank = AdapterBank(state.slots, batching.adapter_bank_bytes)
        self.graphs = (
            DecodeGraphs(
                trunk, self.kv, self.bank, compiled=compile == "max", max_rows=batching.max_batch_rows
            )
            if graphed
            else None
        )
        self._runner = Runner(trunk, self.kv, state, self.bank, self.graphs)
        self.tape = Tape(runs.tape_budget_bytes)
        accounts = Accounts(quotas)
        self._adapters = adapters = AdapterTable(state, runs.max_adapters, accounts, lease_s=runs.run_lease_s)
        self._runs = RunTable(state, self.tape, runs, adapters, accounts)
        self._run_steps = RunSteps(
            trunk, state, self.tape, lease_s=runs.tape_lease_s, staleness_limit=runs.staleness_limit
        )
        self._sessions = SessionTable(self.kv, sessions, trunk.max_positions, self._runs.adapter, accounts)
        self._session_steps = SessionSteps(
            self._runner, self.kv, self._sessions, trunk.dtype, lambda: self.in_one_go()
        )
        self._pacing = Pacing(quotas)
        self._admission = Admission(
            self._sessions,
            self._runs,
            state,
            self.bank,
            self._pacing,
            slot_tokens=self.kv.slot_tokens,
            max_positions=trunk.max_positions,
            # What is not proven in a batch may depend on how far the whole prompt reaches.
            chunk_tokens=batching.chunk_tokens(trunk.device.type) if trunk.batched else 0,
            batch_tokens=batching.max_batch_tokens,
        )
        self._company = Company(batching.wait_ms)
        self._queue = StepQueue()
        self.runs = RunRequests(self._queue, self._runs, adapters, self._admission.refuse_when_draining)
        self.moves = SessionMoves(
            self._queue, self._sessions, self.kv, state, self._admission.refuse_when_draining
        )
        self._ready = Scheduler(batching, batched=trunk.batched, mixes=self.bank.mixes)
        self.lease_s = sessions.lease_s
        self.failure: Exception | None = None
        self.on_failure: Callable[[], object] = lambda: None
        self.in_one_go: Callable[[], AbstractContextManager[None]] = nullcontext
        """What a batch's answers are given within."""
        self._stopping, self._is_ready = threading.Event(), threading.Event()
        self._expire_at, self._ticked_at = 0.0, time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # Called from any thread.

    def start(self) -> None:
        """Returns once it takes steps: what is recorded and compiled for them is so before."""
        self._thread.start()
        if not self._is_ready.wait(PREPARE_S):
            raise SettingError(
                f"decode steps were not recorded within {PREPARE_S:g} s: start the server with --compile off"
            )

    def stop(self) -> None:
        """End the thread after the batch that runs; what still waits is answered with TrunkDraining."""
        self._stopping.set()
        self._queue.shut()
        self._thread.join(STOP_S)

    def drain(self) -> None:
        """Open no further session; those that are open go on."""
        self._admission.drain()

    def submit(self, client: bytes, message: StepMessage | RunStepMessage) -> Future[AnswerMessage]:
        """The future of this step's answer; an error arrives as an answer too."""
        step: Step[Any] = Step(client, message)
        future = step.wait()
        if not self._queue.put(step):
            step.fail(stopped())
        return future

    def fork(self, client: bytes, message: ForkMessage) -> Future[None]:
        self._admission.refuse_when_draining()
        return self._queue.ask(lambda: self._sessions.fork(client, message, time.monotonic()))

    def close(self, client: bytes, message: CloseMessage) -> Future[None]:
        return self._queue.ask(lambda: self._sessions.close(client, message))

    def leave(self, client: bytes) -> Future[None]:
        """Nobody of this client is connected any more: keep its sessions for a short while only."""
        return self._queue.ask(lambda: self._sessions.shorten_leases(client, time.monotonic()))

    @property
    def open_sessions(self) -> int:
        return len(self._sessions)

    @property
    def ran(self) -> BatchCounts:
        return self._session_steps.ran

    # The engine's thread.

    def _loop(self) -> None:
        try:
            if self.trunk.device.type == "cuda":
                # Streams and graphs are those of the thread's current device.
                torch.cuda.set_device(self.trunk.device)
            if self.graphs is not None:
                self.graphs.prepare()
            self._is_ready.set()
            while not self._stopping.is_set():
                self._turn()
        except Exception as error:
            # What can fail for one client is caught there: this is the device, or a slip of ours.
            log.error("the engine failed and ends", exc_info=error)
            self.failure = error
            self.on_failure()
        finally:
            self._is_ready.set()
            self._queue.shut()
            self._refuse_the_rest()

    def _turn(self) -> None:
        now = time.monotonic()
        patience_s = self._pacing.next_in_s(now, at_most=self._patience_s())
        self._queue.wait(0 if self._ready else patience_s)
        self._accept()
        self._tick()
        self.bank.keep(self._sessions.adapters())
        self._expire()
        if self._ready:
            self._wait_for_company()
            self._run_next_batch()

    def _patience_s(self) -> float:
        """How long nothing happens if nobody comes."""
        due_at = min((cohort.due_at for cohort in self._runs.cohorts), default=math.inf)
        return min(max(due_at - time.monotonic(), 0.0), EXPIRY_CHECK_S)

    def _tick(self) -> None:
        now = time.monotonic()
        # A turn waits no longer than this: what is over was a long batch, or the process stood still.
        away_s = now - self._ticked_at - EXPIRY_CHECK_S
        self._ticked_at = now
        for cohort in self._runs.cohorts:
            if away_s > 0:
                cohort.allow(away_s)
            if cohort.due_at <= now:
                cohort.tick(now)

    def _accept(self) -> None:
        for item in self._queue.take():
            if isinstance(item, Step):
                self._admit(item)
            else:
                item()
        if self._pacing:
            for ready in self._pacing.released(time.monotonic()):
                self._let_wait(ready)

    def _admit(self, step: Step[Any]) -> None:
        try:
            if (ready := self._admission.admit(step)) is not None:
                self._let_wait(ready)
        except Exception as error:
            step.fail(explained(error))

    def _let_wait(self, ready: Ready) -> None:
        self._ready.add(ready)
        if isinstance(ready, ReadyStep):
            self._company.came(ready)

    def _expire(self) -> None:
        """Now and then: it looks at everything that is held."""
        if (now := time.monotonic()) < self._expire_at:
            return
        self._expire_at = now + EXPIRY_CHECK_S
        self._pacing.forget_full(now)
        if expired := self._sessions.expire(now):
            log.info("sessions expired", sessions=expired)
        if expired := self.tape.expire(now):
            log.info("forwards without a backward expired", forwards=expired)
        if names := self._runs.expire(now):
            log.warning("runs that nobody used were closed", runs=names)
        if names := self._adapters.expire(now, set(self._sessions.adapters())):
            log.warning("adapters that nobody used were unloaded", adapters=names)

    def _wait_for_company(self) -> None:
        ready = self._ready
        while (room := ready.room_for_company) and not self._stopping.is_set():
            awaited = self._company.awaited(time.monotonic(), len(ready), room, self._joins_soon)
            if awaited is None:
                return
            self._queue.wait(awaited.within_s, awaited.sessions)
            self._accept()

    def _joins_soon(self, session: Session) -> bool:
        """Whether the session's next step could run with those that wait: its client may go on at once."""
        return self._ready.joins(session) and not self._pacing.is_broke(session.id[0], time.monotonic())

    def _run_next_batch(self) -> None:
        self._give_up_late_steps()
        if not self._ready:
            return
        batch = self._ready.next_batch()
        for each in batch:
            if isinstance(each, ReadyRunStep):
                self._do(each)
        if members := [each for each in batch if isinstance(each, ReadyStep)]:
            self._do_together(members)

    def _do_together(self, members: list[ReadyStep]) -> None:
        began, is_decode = time.monotonic(), members[0].work is Work.DECODE
        unfinished = self._session_steps.do(members)
        now = time.monotonic()
        for member in unfinished:
            if not self._pacing.holds_back_piece(member, now):
                self._ready.add(member)
        if is_decode:
            self._company.ran(members, began, now)
            self._pacing.ran(members, now)

    def _give_up_late_steps(self) -> None:
        now = time.monotonic()
        for late in self._taken_out_where(lambda each: each.step.deadline < now or each.step.is_cancelled):
            if isinstance(late, ReadyStep):
                self._session_steps.give_up(late)
            else:
                late.step.fail(
                    StepTimeout("the step waited longer than its deadline and was not run: ask again")
                )

    def _taken_out_where(self, wanted: Callable[[Ready], bool]) -> list[Ready]:
        return [*self._ready.take_out_where(wanted), *self._pacing.take_out_where(wanted)]

    def _do(self, member: ReadyRunStep) -> None:
        """A run's step; one that fails leaves the run as it was, so that it can be asked again, or broken."""
        step = member.step
        queued_us = int((time.monotonic() - step.arrived_at) * 1e6)
        try:
            with timed(self.trunk.device) as clock:
                found = self._runs.find(step.client, step.message.key)
                answer = self._run_steps.do(found, step.message)
        except Exception as error:
            step.fail(explained(error))
            return
        if answer is None:
            assert found.run.cohort is not None
            found.run.cohort.park(found, step)
        else:
            step.answer(replace(answer, timings=Timings(queued_us=queued_us, device_us=clock.us)))

    def _refuse_the_rest(self) -> None:
        for member in self._taken_out_where(lambda each: True):
            member.step.fail(stopped())
        for cohort in self._runs.cohorts:
            cohort.end(stopped())
        for item in self._queue.take():
            if isinstance(item, Step):
                item.fail(stopped())
            else:
                # A request answers its own future, with an error if need be.
                item()
