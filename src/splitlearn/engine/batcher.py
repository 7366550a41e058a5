"""Which waiting steps run together with the one whose turn it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from splitlearn.config import BatchingConfig
from splitlearn.engine.ready_step import ReadyStep
from splitlearn.engine.session import Session
from splitlearn.engine.trunk_state import AdapterVersion

Mixes = Callable[[AdapterVersion], bool]


def no_adapter_mixes(adapter: AdapterVersion) -> bool:
    return False


class Batcher:
    """All that fit: as many new tokens a row, the same precision, adapters that may be mixed.

    A step that is cut into pieces counts with the piece that runs next. Steps without a session,
    and those of families that are not proven in a batch, run one by one.

    Args:
        mixes: whether an adapter's steps may run beside those of others.
    """

    def __init__(self, config: BatchingConfig, *, batched: bool, mixes: Mixes = no_adapter_mixes) -> None:
        self._config = config
        self._batched = batched
        self._mixes = mixes

    def choose(self, first: ReadyStep, waiting: Sequence[ReadyStep]) -> list[ReadyStep]:
        """`first` and its company out of those that wait; where not all fit, clients have seats in turn."""
        if not self._batched or first.session is None:
            return [first]
        company = [other for other in waiting if other is not first and self._go_together(first, other)]
        everybody = [first, *company]
        if self._fits(sum(member.rows for member in everybody), first.tokens):
            return everybody
        return self._seated(everybody)

    def room(self, waiting: Sequence[ReadyStep]) -> int:
        """How many further rows would fit beside those that wait."""
        taken = sum(each.rows for each in waiting)
        return max(self._config.max_batch_rows - taken, 0) if self._batched else 0

    def joins(self, session: Session, waiting: ReadyStep) -> bool:
        """Whether the session's next step, of as many tokens, could run beside this one."""
        theirs = waiting.session
        return (
            theirs is not None
            and session.precision.autocast == theirs.precision.autocast
            and self._mix(session.adapter, theirs.adapter)
        )

    def _seated(self, everybody: list[ReadyStep]) -> list[ReadyStep]:
        first, *company = _in_turn(everybody)
        batch, rows = [first], first.rows
        for other in company:
            if self._fits(rows + other.rows, first.tokens):
                batch.append(other)
                rows += other.rows
        return batch

    def _fits(self, rows: int, tokens: int) -> bool:
        config = self._config
        return rows <= config.max_batch_rows and rows * tokens <= config.max_batch_tokens

    def _go_together(self, first: ReadyStep, other: ReadyStep) -> bool:
        mine = first.session
        return mine is not None and first.tokens == other.tokens and self.joins(mine, other)

    def _mix(self, mine: AdapterVersion, others: AdapterVersion) -> bool:
        return mine is others or (self._mixes(mine) and self._mixes(others))


def _in_turn(steps: Sequence[ReadyStep]) -> list[ReadyStep]:
    """Each client's first step, then each one's second, and so on."""
    had: Counter[bytes] = Counter()
    rounds: dict[int, list[ReadyStep]] = {}
    for step in steps:
        client = step.step.client
        rounds.setdefault(had[client], []).append(step)
        had[client] += 1
    return [step for round in rounds.values() for step in round]
