"""Steps of one kind that wait, and which of them comes first: clients in rounds, then deadlines."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from splitlearn.engine.ready_step import Ready


class WaitingLine:
    """Each client comes first once a round, however many steps of its wait.

    Who begins to wait joins the next round, so that a round ends. Within a round, and among one client's
    steps, the earliest deadline goes first; then the oldest.
    """

    def __init__(self) -> None:
        self._waiting: list[Ready] = []
        self._steps_of: Counter[bytes] = Counter()
        self._round_of: dict[bytes, int] = {}
        self._round = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Ready]:
        """The most urgent first."""
        return iter(self._waiting)

    def add(self, ready: Ready) -> None:
        if not self._waiting or ready.urgency >= self._waiting[-1].urgency:
            self._waiting.append(ready)
        else:
            insort(self._waiting, ready, key=lambda each: each.urgency)
        client = ready.step.client
        self._steps_of[client] += 1
        self._round_of.setdefault(client, self._round + 1)

    def first(self) -> Ready:
        """Whose turn it is; its client comes first again in the next round."""
        first = min(self._waiting, key=lambda ready: self._round_of[ready.step.client])
        client = first.step.client
        self._round = self._round_of[client]
        self._round_of[client] += 1
        return first

    def take_out(self, gone: Collection[Ready]) -> None:
        self._waiting = [ready for ready in self._waiting if ready not in gone]
        for ready in gone:
            client = ready.step.client
            self._steps_of[client] -= 1
            if not self._steps_of[client]:
                del self._steps_of[client], self._round_of[client]

    def take_out_where(self, wanted: Callable[[Ready], bool]) -> list[Ready]:
        if gone := [ready for ready in self._waiting if wanted(ready)]:
            self.take_out(set(gone))
        return gone
