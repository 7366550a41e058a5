"""One step as it waits: what is asked, by whom, since when, and who waits for the answer."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from splitlearn.errors import SplitLearnError
from splitlearn.wire.messages import AnswerMessage, RunStepMessage, StepMessage

DECODE_TOKENS = 32
"""A session's step of at most so many tokens takes about as long as one of a single token."""
Message = TypeVar("Message", StepMessage, RunStepMessage)


@dataclass(slots=True, eq=False)
class Step(Generic[Message]):
    """A step is answered once; several may wait for it, if a client asked again meanwhile."""

    client: bytes
    message: Message
    arrived_at: float = field(default_factory=time.monotonic)
    waiting: list[Future[AnswerMessage]] = field(default_factory=list)

    def wait(self) -> Future[AnswerMessage]:
        future: Future[AnswerMessage] = Future()
        self.waiting.append(future)
        return future

    def answer(self, answer: AnswerMessage) -> None:
        for future in self.waiting:
            if future.set_running_or_notify_cancel():
                future.set_result(answer)

    def fail(self, error: SplitLearnError) -> None:
        self.answer(AnswerMessage(self.message.key, error=error))

    @property
    def is_short(self) -> bool:
        """Whether it is a session's, and takes about as long as a step of a single token."""
        return isinstance(self.message, StepMessage) and self.message.tokens <= DECODE_TOKENS

    @property
    def deadline(self) -> float:
        """When its client gives up on it; infinite where it never does."""
        deadline_s = self.message.deadline_s
        return self.arrived_at + deadline_s if deadline_s else math.inf

    @property
    def is_cancelled(self) -> bool:
        return all(map(Future.cancelled, self.waiting))
