"""Answers kept for clients that lose one and ask again, under one byte budget."""

from __future__ import annotations

from collections import OrderedDict, deque

from splitlearn.engine.session import SessionId
from splitlearn.wire.messages import AnswerMessage


class AnswerWindow:
    """At most `window` answers a session and `max_bytes` over all; the oldest go first."""

    def __init__(self, window: int, max_bytes: int) -> None:
        self._window = window
        self._max_bytes = max_bytes
        self._answers: OrderedDict[tuple[SessionId, int], AnswerMessage] = OrderedDict()
        self._steps: dict[SessionId, deque[int]] = {}
        self.bytes = 0

    def keep(self, session: SessionId, step: int, answer: AnswerMessage) -> None:
        if _bytes_of(answer) > self._max_bytes:
            return
        steps = self._steps.setdefault(session, deque())
        steps.append(step)
        self._answers[session, step] = answer
        self.bytes += _bytes_of(answer)
        while len(steps) > self._window:
            self._drop(session, steps[0])
        while self.bytes > self._max_bytes:
            self._drop(*next(iter(self._answers)))

    def get(self, session: SessionId, step: int) -> AnswerMessage | None:
        return self._answers.get((session, step))

    def release(self, session: SessionId, acked_through: int) -> None:
        """The client has these answers: they need no longer be kept."""
        steps = self._steps.get(session, ())
        while steps and steps[0] <= acked_through:
            self._drop(session, steps[0])

    def forget(self, session: SessionId) -> None:
        while steps := self._steps.get(session):
            self._drop(session, steps[0])
        self._steps.pop(session, None)

    def _drop(self, session: SessionId, step: int) -> None:
        self._steps[session].remove(step)
        self.bytes -= _bytes_of(self._answers.pop((session, step)))


def _bytes_of(answer: AnswerMessage) -> int:
    activation_BTD = answer.activation_BTD
    return 0 if activation_BTD is None else activation_BTD.nbytes
