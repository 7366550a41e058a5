"""What forwards kept until their gradients come back, and answers to those, under one byte budget."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from torch import Tensor

from splitlearn.engine.account import Account, unlimited
from splitlearn.engine.trunk_state import AdapterVersion
from splitlearn.errors import ResourceExhausted, TapeExpired
from splitlearn.wire.messages import AnswerMessage, RunStepMessage

TapeKey = tuple[int, int, int]
"""A member's number, the optimizer step that the forward was for, and the microbatch in it."""
KEPT = "what this batch keeps until its gradient comes"


@dataclass(slots=True, eq=False)
class TapeEntry:
    """One forward: what it was asked, at which version; its graph, unless it is to be recomputed."""

    asked: RunStepMessage
    adapter: AdapterVersion
    bytes: int
    lease_until: float
    input_BTD: Tensor | None = None
    output_BTD: Tensor | None = None
    account: Account = field(default_factory=unlimited)


class Tape:
    """Belongs to the engine's thread. Over the budget the oldest answers go, then the oldest forwards.

    Nobody loses by it: a client whose answer was lost, too, or whose forward is gone, forwards again.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._entries: OrderedDict[TapeKey, TapeEntry] = OrderedDict()
        self._answers: OrderedDict[TapeKey, AnswerMessage] = OrderedDict()
        self.bytes = 0
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._entries)

    def require_room(self, needed: int) -> None:
        """Let the oldest entries go until so many bytes fit.

        Raises:
            ResourceExhausted: the budget is smaller than this one entry.
        """
        if needed > self._budget_bytes:
            raise ResourceExhausted(
                f"this batch keeps {needed:,} bytes until its gradient comes, the server allows "
                f"{self._budget_bytes:,}: use fewer rows or tokens, recompute or checkpoint_every=1 for the "
                "run, or start the server with a larger --tape-budget",
                facts={"wanted_bytes": needed, "total_bytes": self._budget_bytes},
            )
        self._drop_answers_for(needed)
        while self.bytes + needed > self._budget_bytes:
            self._drop(next(iter(self._entries)))
            self.evicted += 1

    def put(self, key: TapeKey, entry: TapeEntry) -> None:
        if key in self._entries:
            self._drop(key)
        entry.account.require(entry.bytes, KEPT)
        self.require_room(entry.bytes)
        entry.account.take(entry.bytes, KEPT)
        self._entries[key] = entry
        self.bytes += entry.bytes

    def get(self, key: TapeKey) -> TapeEntry | None:
        return self._entries.get(key)

    def take(self, key: TapeKey) -> TapeEntry:
        """The entry, which is then no longer here.

        Raises:
            TapeExpired: it is gone; the same forward can be asked for again.
        """
        entry = self._entries.get(key)
        if entry is None:
            raise TapeExpired(
                "what this batch's forward kept is gone (its lease ran out, or others needed the room): "
                "forward again"
            )
        self._drop(key)
        return entry

    def keep_answer(self, key: TapeKey, answer: AnswerMessage) -> None:
        """For a client that loses it; where there is no room beside the forwards, it is not kept."""
        if key in self._answers:
            self._drop_answer(key)
        self._drop_answers_for(_bytes_of(answer))
        if self.bytes + _bytes_of(answer) <= self._budget_bytes:
            self._answers[key] = answer
            self.bytes += _bytes_of(answer)

    def answer(self, key: TapeKey) -> AnswerMessage | None:
        return self._answers.get(key)

    def release(self, run: int, step: int, acked_through: int) -> None:
        """The client has the answers to this step's microbatches below `acked_through`."""
        for key in [key for key in self._answers if key[:2] == (run, step) and key[2] < acked_through]:
            self._drop_answer(key)

    def forget_answers(self, run: int) -> None:
        for key in [key for key in self._answers if key[0] == run]:
            self._drop_answer(key)

    def forget_run(self, run: int) -> None:
        self.forget_answers(run)
        for key in [key for key in self._entries if key[0] == run]:
            self._drop(key)

    def expire(self, now: float) -> int:
        """Let go of what nobody came back for; how many entries that were."""
        late = [key for key, entry in self._entries.items() if entry.lease_until < now]
        for key in late:
            self._drop(key)
        self.evicted += len(late)
        return len(late)

    def _drop(self, key: TapeKey) -> None:
        entry = self._entries.pop(key)
        self.bytes -= entry.bytes
        entry.account.give_back(entry.bytes)

    def _drop_answers_for(self, needed: int) -> None:
        while self._answers and self.bytes + needed > self._budget_bytes:
            self._drop_answer(next(iter(self._answers)))

    def _drop_answer(self, key: TapeKey) -> None:
        self.bytes -= _bytes_of(self._answers.pop(key))


def _bytes_of(answer: AnswerMessage) -> int:
    return 0 if answer.activation_BTD is None else answer.activation_BTD.nbytes
