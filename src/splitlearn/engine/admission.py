"""Which steps are let in to wait for their turn, and which are answered at once."""

from __future__ import annotations

import threading
import time
from typing import Any

from splitlearn.engine.adapter_bank import AdapterBank
from splitlearn.engine.pacing import Pacing
from splitlearn.engine.ready_step import ReadyRunStep, ReadyStep
from splitlearn.engine.run_table import RunTable
from splitlearn.engine.session import require_room
from splitlearn.engine.session_table import SessionTable
from splitlearn.engine.step import Step
from splitlearn.engine.trunk_state import TrunkState
from splitlearn.errors import MessageError, ResourceExhausted, StepOutOfOrder, TrunkDraining
from splitlearn.vocabulary import Phase
from splitlearn.wire.messages import RunStepMessage, StepMessage


class Admission:
    """Belongs to the engine's thread, but for `drain` and `refuse_when_draining`."""

    def __init__(
        self,
        sessions: SessionTable,
        runs: RunTable,
        state: TrunkState,
        bank: AdapterBank,
        pacing: Pacing,
        *,
        slot_tokens: int,
        max_positions: int | None,
        chunk_tokens: int,
        batch_tokens: int,
    ) -> None:
        self._sessions = sessions
        self._runs = runs
        self._state = state
        self._bank = bank
        self._pacing = pacing
        self._slot_tokens = slot_tokens
        self._max_positions = max_positions
        self._chunk_tokens, self._batch_tokens = chunk_tokens, batch_tokens
        self._draining = threading.Event()

    def drain(self) -> None:
        self._draining.set()

    def refuse_when_draining(self) -> None:
        if self._draining.is_set():
            raise TrunkDraining("the server is stopping and opens no new session: try another, or later")

    def admit(self, step: Step[Any]) -> ReadyStep | ReadyRunStep | None:
        """What is to wait for its turn.

        None where the step was done before, or runs already, or waits until its client's quota allows it.

        Raises:
            SplitLearnError: what the step asks for cannot be done.
        """
        ready = self._to_be_done(step)
        try:
            held_back = ready is not None and self._pacing.holds_back(ready, time.monotonic())
        except ResourceExhausted:
            if isinstance(ready, ReadyStep) and ready.session is not None:
                self._sessions.let_go(ready.session, ready.step)
            raise
        return None if held_back else ready

    def _to_be_done(self, step: Step[Any]) -> ReadyStep | ReadyRunStep | None:
        if isinstance(step.message, RunStepMessage):
            return ReadyRunStep(step, self._runs.find(step.client, step.message.key))
        self._check_opening(step.message)
        if step.message.key.session == 0:
            return self._admit_lone(step)
        return self._admit_to_session(step)

    def _admit_lone(self, step: Step[StepMessage]) -> ReadyStep:
        message = step.message
        if message.open or message.keep_positions is not None or message.select_rows is not None:
            raise MessageError("a step without a session has nothing to open, to keep or to select")
        require_room(message, 0, self._slot_tokens, self._max_positions)
        return ReadyStep(step, None)

    def _admit_to_session(self, step: Step[StepMessage]) -> ReadyStep | None:
        key = step.message.key
        session = self._sessions.enter(step.client, step.message, time.monotonic())
        if (running := session.running) is not None:
            if running.message.key != key:
                raise StepOutOfOrder(
                    f"step {key.step} came while step {running.message.key.step} of its session runs",
                    facts={"current_step": session.next_step},
                )
            running.waiting.extend(step.waiting)
            return None
        if kept := self._sessions.kept_answer(session, key.step):
            step.answer(kept)
            return None
        self._sessions.check(session, step.message)
        session.running = step
        self._bank.admit(session.adapter)
        # A piece of many rows is no more than a batch.
        a_row = max(self._batch_tokens // step.message.rows, 1)
        return ReadyStep(step, session, min(self._chunk_tokens, a_row))

    def _check_opening(self, message: StepMessage) -> None:
        if message.key.phase is not Phase.FORWARD:
            raise MessageError("a session knows forward steps only; the other phases belong to a run")
        if message.open is not None:
            self.refuse_when_draining()
            self._state.require_precision(message.open.precision)
