"""One client's turns beside others' texts: its prompts and training steps wait here for theirs."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator

from splitlearn.engine.ready_step import Ready, Work

TEXT_LASTS_S = 1.0
"""A text whose last token is older than that keeps nobody waiting."""


class TurnQuota:
    """Belongs to the engine's thread; knows no clock but the times that it is told.

    A decode step waits for whatever turn has begun, however short it is in tokens. So what counts for those
    who write is how many of their steps meet one. While other clients write, a client has one turn of
    its own (a piece of a prompt, a forward or a backward) for so many batches of theirs; otherwise as many as
    it likes. It is held back between two steps of a text, too: the next one would meet it.
    """

    def __init__(self, share: float | None) -> None:
        self._batches_a_turn = math.ceil(1 / share) if share else 0
        self._batches = 0
        self._batches_alone: Counter[bytes] = Counter()
        self._last_turn: dict[bytes, int] = {}
        self._wrote_at: dict[bytes, float] = {}
        self._waiting: dict[bytes, deque[Ready]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def holds_back(self, ready: Ready, now: float) -> bool:
        """Whether what runs next of the step has to wait here; otherwise it has its client's turn."""
        # What carries no tensor takes next to no time.
        if not self._batches_a_turn or ready.work is Work.DECODE or not ready.step.message.rows:
            return False
        client = ready.step.client
        if client not in self._waiting and self._has_turn(client, now):
            self._last_turn[client] = self._others_batches(client)
            return False
        self._waiting.setdefault(client, deque()).append(ready)
        return True

    def released(self, now: float) -> Iterator[Ready]:
        """Those that need wait no longer."""
        for client in [client for client in self._waiting if self._has_turn(client, now)]:
            self._last_turn[client] = self._others_batches(client)
            line = self._waiting[client]
            yield line.popleft()
            if not line:
                del self._waiting[client]

    def ran(self, clients: Collection[bytes], now: float) -> None:
        """A batch of these clients' decode steps is answered."""
        self._batches += 1
        self._wrote_at.update(dict.fromkeys(clients, now))
        if len(clients) == 1:
            self._batches_alone.update(clients)

    def take_out_where(self, wanted: Callable[[Ready], bool]) -> list[Ready]:
        gone = [ready for line in self._waiting.values() for ready in line if wanted(ready)]
        if gone:
            kept = {c: deque(r for r in line if r not in gone) for c, line in self._waiting.items()}
            self._waiting = {client: line for client, line in kept.items() if line}
        return gone

    def forget_idle(self, now: float) -> None:
        """Clients come and go: who would have its turn anyway need not be known."""
        self._wrote_at = {c: at for c, at in self._wrote_at.items() if now - at < TEXT_LASTS_S}
        for client in (self._last_turn.keys() | self._batches_alone.keys()) - self._waiting.keys():
            if client not in self._wrote_at and self._has_turn(client, now):
                self._last_turn.pop(client, None)
                del self._batches_alone[client]

    def _has_turn(self, client: bytes, now: float) -> bool:
        last = self._last_turn.get(client)
        if last is None or self._others_batches(client) - last >= self._batches_a_turn:
            return True
        others = (at for writer, at in self._wrote_at.items() if writer != client)
        return all(now - at >= TEXT_LASTS_S for at in others)

    def _others_batches(self, client: bytes) -> int:
        """In which another client had a step, too."""
        return self._batches - self._batches_alone[client]
