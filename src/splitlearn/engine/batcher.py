"""Which waiting steps run together now."""

from __future__ import annotations

from collections.abc import Sequence

from splitlearn.config import BatchingConfig
from splitlearn.engine.ready_step import ReadyStep


class Batcher:
    """The oldest step runs now, and with it all that fit: as many new tokens a row, the same precision.

    A step that is cut into pieces counts with the piece that runs next. Steps without a session,
    and those of families that are not proven in a batch, run one by one.
    """

    def __init__(self, config: BatchingConfig, *, batched: bool) -> None:
        self._config = config
        self._batched = batched

    def choose(self, ready: Sequence[ReadyStep]) -> list[ReadyStep]:
        """The next batch, out of the steps that are ready, in their order; at least the first of them."""
        first, *others = ready
        batch = [first]
        rows = first.step.message.rows
        for other in others:
            fits = self._fits(rows + other.step.message.rows, first.tokens)
            if fits and self._go_together(first, other):
                batch.append(other)
                rows += other.step.message.rows
        return batch

    def _fits(self, rows: int, tokens: int) -> bool:
        config = self._config
        return rows <= config.max_batch_rows and rows * tokens <= config.max_batch_tokens

    def _go_together(self, first: ReadyStep, other: ReadyStep) -> bool:
        if not self._batched or first.session is None or other.session is None:
            return False
        same_tokens = first.tokens == other.tokens
        same_adapter = first.session.adapter is other.session.adapter
        same_autocast = first.session.precision.autocast == other.session.precision.autocast
        return same_tokens and same_adapter and same_autocast
