"""Which waiting steps run now: decode steps, pieces of prompts and training steps take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from splitlearn.config import BatchingConfig
from splitlearn.engine.batcher import Batcher, Mixes, no_adapter_mixes
from splitlearn.engine.ready_step import Ready, ReadyStep, Work
from splitlearn.engine.session import Session
from splitlearn.engine.waiting_line import WaitingLine

NEARLY_ONE = 1 - 1e-9


class Share:
    """One side's part of the turns while both sides wait; a turn that is not contested is never refused.

    Little is saved up: after a turn of the other side alone, this side is no further ahead than after a
    contested one that it lost.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._most = max(share, 1 - share)
        self._credit = 0.0

    def is_next(self, *, waits: bool, other_waits: bool) -> bool:
        """Whether the next turn is this side's; it is then taken, by one of both."""
        due = self._credit + self._share
        is_next = waits and (not other_waits or due >= NEARLY_ONE)
        self._credit = max(due - 1, 0.0) if is_next else min(due, self._most)
        return is_next


class Scheduler:
    """All that waits for its turn. What it chooses depends on what came in which order, not on any clock.

    Decode steps have their share of the turns, training steps theirs of what decode steps leave, and
    prompts the rest; who waits alone has every turn. A turn is one batch of decode steps, one batch
    of pieces of prompts, or one training step. Among steps of one kind clients go in rounds.
    """

    def __init__(self, config: BatchingConfig, *, batched: bool, mixes: Mixes = no_adapter_mixes) -> None:
        self._batcher = Batcher(config, batched=batched, mixes=mixes)
        self._decode = Share(config.decode_share)
        self._training = Share(config.training_share)
        self._lines = {work: WaitingLine() for work in Work}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Ready]:
        return chain.from_iterable(self._lines.values())

    def add(self, ready: Ready) -> None:
        self._lines[ready.work].add(ready)

    @property
    def room_for_company(self) -> int:
        """How many further rows a batch of the decode steps that wait takes; 0 where others wait, too."""
        decode = self._lines[Work.DECODE]
        return self._batcher.room(_sessions_steps(decode)) if len(self) == len(decode) else 0

    def joins(self, session: Session) -> bool:
        """Whether a step of this session could run in one batch with the decode steps that wait."""
        return all(self._batcher.joins(session, each) for each in _sessions_steps(self._lines[Work.DECODE]))

    def next_batch(self) -> Sequence[Ready]:
        """Taken out of what waits, which must be something; a training step is a batch of its own."""
        line = self._next_line()
        first = line.first()
        batch = (
            self._batcher.choose(first, _sessions_steps(line)) if isinstance(first, ReadyStep) else [first]
        )
        line.take_out(set(batch))
        return batch

    def take_out_where(self, wanted: Callable[[Ready], bool]) -> list[Ready]:
        return [ready for line in self._lines.values() for ready in line.take_out_where(wanted)]

    def _next_line(self) -> WaitingLine:
        decode, prefill, training = (self._lines[work] for work in (Work.DECODE, Work.PREFILL, Work.TRAINING))
        if self._decode.is_next(waits=bool(decode), other_waits=bool(prefill) or bool(training)):
            return decode
        if self._training.is_next(waits=bool(training), other_waits=bool(prefill)):
            return training
        return prefill


def _sessions_steps(line: WaitingLine) -> list[ReadyStep]:
    return [ready for ready in line if isinstance(ready, ReadyStep)]
