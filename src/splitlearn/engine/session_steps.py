"""Does sessions' steps on the trunk: bring the sessions to where the steps begin, run one batch, answer."""

from __future__ import annotations

import time

import structlog
import torch
from torch import Tensor

from splitlearn.engine.batch import run_batch
from splitlearn.engine.batch_plan import BatchCounts
from splitlearn.engine.failures import explained
from splitlearn.engine.kv_cache import KvCache
from splitlearn.engine.ready_step import ReadyStep
from splitlearn.engine.runner import Ran, Runner
from splitlearn.engine.session_table import SessionTable
from splitlearn.errors import SessionLost
from splitlearn.vocabulary import Timings
from splitlearn.wire.messages import AnswerMessage

# B rows   T new tokens   D hidden

log = structlog.get_logger("splitlearn.engine")


class SessionSteps:
    """Belongs to the engine's thread. A step that fails costs its own session only."""

    def __init__(self, runner: Runner, kv: KvCache, sessions: SessionTable, dtype: torch.dtype) -> None:
        self.ran = BatchCounts()
        self._runner = runner
        self._kv = kv
        self._sessions = sessions
        self._dtype = dtype

    def do(self, batch: list[ReadyStep]) -> None:
        started = time.monotonic()
        if prepared := [member for member in batch if self._prepare(member)]:
            self._run_or_split(prepared, started)

    def give_up(self, member: ReadyStep) -> None:
        """The step is not run; a session that it was to open is not kept for a client that left."""
        session = member.session
        if session is None or session.running is not member.step:
            return
        session.running = None
        if session.length == 0 and session.next_step == 1:
            self._sessions.drop(session)

    def _prepare(self, member: ReadyStep) -> bool:
        """Bring the session into the state that its step starts from; a step that cannot is answered."""
        if member.session is None:
            return True
        try:
            if member.session.running is not member.step:
                raise SessionLost("the session was closed while this step waited")
            member.session.prepare(member.step.message, self._kv)
        except Exception as error:
            self.give_up(member)
            member.step.fail(explained(error))
            return False
        return True

    def _run_or_split(self, batch: list[ReadyStep], started: float) -> None:
        """A batch that fails runs again one by one, so that one member's fault is not the others'."""
        try:
            plan, ran = run_batch(self._runner, batch, self._dtype)
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
            member.step.fail(explained(error))
