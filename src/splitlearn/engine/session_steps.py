"""Does sessions' steps on the trunk, long ones in pieces: prepare the sessions, run one batch, answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

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
from splitlearn.errors import SessionLost, StepTimeout
from splitlearn.vocabulary import Timings
from splitlearn.wire.messages import AnswerMessage

# B rows   T new tokens   D hidden

log = structlog.get_logger("splitlearn.engine")


class SessionSteps:
    """Belongs to the engine's thread. A step that fails costs its own session only.

    Args:
        in_one_go: what the answers of a forward are given within.
    """

    def __init__(
        self,
        runner: Runner,
        kv: KvCache,
        sessions: SessionTable,
        dtype: torch.dtype,
        in_one_go: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._in_one_go = in_one_go
        self.ran = BatchCounts()
        self._runner = runner
        self._kv = kv
        self._sessions = sessions
        self._dtype = dtype

    def do(self, batch: list[ReadyStep]) -> list[ReadyStep]:
        """Run the next piece of each; those that have further pieces are given back."""
        started = time.monotonic()
        if prepared := [member for member in batch if self._prepare(member, started)]:
            # Neighbouring slots are read as they lie, without a copy.
            prepared.sort(key=_first_slot)
            self._run_or_split(prepared)
        return [member for member in prepared if member.session and member.session.running is member.step]

    def give_up(self, member: ReadyStep) -> None:
        """Nobody waits for the step any more: it is not run to its end."""
        why = "the step waited longer than its deadline and was not run: ask again"
        if member.is_underway:
            why = (
                f"{member.done:,} of the step's {member.step.message.tokens:,} tokens had run at its "
                "deadline, so its session was closed: generate again from the prompt"
            )
        self._let_go(member)
        member.step.fail(StepTimeout(why))

    def _let_go(self, member: ReadyStep) -> None:
        if member.session is not None:
            self._sessions.let_go(member.session, member.step, is_underway=member.is_underway)

    def _prepare(self, member: ReadyStep, started: float) -> bool:
        """Bring the session into the state that its step starts from; a step that cannot is answered."""
        session, step = member.session, member.step
        try:
            if session is not None and session.running is not step:
                raise SessionLost("the session was closed while this step waited")
            if not member.is_underway:
                member.queued_us = int((started - step.arrived_at) * 1e6)
                if session is not None:
                    session.prepare(step.message, self._kv)
        except Exception as error:
            self._let_go(member)
            step.fail(explained(error))
            return False
        return True

    def _run_or_split(self, batch: list[ReadyStep]) -> None:
        """A batch that fails runs again one by one, so that one member's fault is not the others'."""
        try:
            plan, ran = run_batch(self._runner, batch, self._dtype)
        except Exception as error:
            if len(batch) > 1:
                log.warning("a batch failed and runs one by one", steps=len(batch), exc_info=error)
                for member in batch:
                    self._run_or_split([member])
            else:
                self._fail(batch[0], error)
        else:
            if plan is not None:
                self.ran.note(plan, ran.device_us)
            with self._in_one_go():
                for member, activation_BTD in zip(batch, _parts(batch, ran.activation_BTD), strict=True):
                    try:
                        self._take(member, activation_BTD, ran)
                    except Exception as error:
                        self._fail(member, error)

    def _take(self, member: ReadyStep, activation_BTD: Tensor, ran: Ran) -> None:
        dtype = member.step.message.activation_BTD.dtype
        if activation_BTD.dtype != dtype:
            activation_BTD = activation_BTD.to(dtype)
        member.take(activation_BTD, ran.device_us)
        if member.is_done:
            self._answer(member)

    def _answer(self, member: ReadyStep) -> None:
        message = member.step.message
        timings = Timings(queued_us=member.queued_us, device_us=member.device_us)
        answer = AnswerMessage(message.key, member.joined(), timings)
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


def _parts(batch: list[ReadyStep], activation_BTD: Tensor) -> Sequence[Tensor]:
    """Each member's rows, copied: kept as a view, an answer would keep the whole batch's memory."""
    if len(batch) == 1:
        return (activation_BTD,)
    parts: Sequence[Tensor] = torch.split_with_sizes_copy(  # type: ignore[func-returns-value, assignment]
        activation_BTD, [member.rows for member in batch]
    )
    return parts


def _first_slot(member: ReadyStep) -> int:
    return 0 if member.session is None else member.session.slots[0]
