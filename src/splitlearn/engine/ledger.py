"""All that a cohort has done, in order: a line of JSON each; on the disk before its members hear of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator

import structlog

from splitlearn.errors import CheckpointError
from splitlearn.monitor.events import (
    Event,
    Listener,
    MemberChanged,
    RoundClosed,
    event_of,
    figures,
)

log = structlog.get_logger("splitlearn.cohort")


class Ledger:
    """Belongs to the engine's thread. What is not on the disk yet is held here, nothing else."""

    def __init__(self, run: str, listener: Listener | None = None) -> None:
        self._run = run
        self._listener = listener
        self.count = 0
        """Events so far, since the run was opened or restored."""
        self.kept = 0
        """How many of those are on the disk; all of them, where nothing keeps them."""
        self.offset = 0
        """Where the ledger's file ends, in bytes."""
        self._tail: list[str] = []

    def add(self, event: Event) -> None:
        self.count += 1
        told = figures(event)
        self._tail.append(json.dumps(told | {"at": round(time.time(), 3)}))
        kind = told.pop("event")
        # A round is everyday business; who comes and goes is not.
        tell = log.info if isinstance(event, MemberChanged) else log.debug
        tell(
            f"cohort: {kind}", run=self._run, **{name: each for name, each in told.items() if name != "parts"}
        )
        if self._listener is not None:
            self._listener(self._run, event)

    def tail(self) -> tuple[str, ...]:
        """The lines that are not on the disk yet."""
        return tuple(self._tail)

    def keep(self, count: int, offset: int) -> None:
        """So many events are on the disk, up to there in the ledger's file."""
        if count > self.kept:
            del self._tail[: count - self.kept]
            self.kept, self.offset = count, offset


def read(lines: Iterable[str]) -> Iterator[Event]:
    """The events of a ledger's lines.

    Raises:
        CheckpointError: a line is none.
    """
    for number, line in enumerate(lines, 1):
        try:
            yield event_of(json.loads(line))
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"line {number} of the ledger is torn or was changed") from None


def rounds(events: Iterable[Event]) -> Iterator[RoundClosed]:
    """The optimizer steps among them."""
    return (event for event in events if isinstance(event, RoundClosed))
