"""Which rows of a decode graph are which of the batch's, and where their keys and values lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from splitlearn.engine.batch_plan import BatchPlan
from splitlearn.engine.kv_cache import KvCache
from splitlearn.model.lora_bank import BARE_PLACE
from splitlearn.model.static_layer import FEWEST_COLUMNS, bucket
from splitlearn.wire.host_memory import host_like

# R rows of a graph   B rows of a batch   D hidden   K columns

SLOT, COLUMN, POSITION, ANSWER, ADAPTER = range(5)


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What a graph is recorded for: up to `rows` rows that look at up to `columns` columns.

    `standing`: row i is slot i, read as it lies; else each row's slot is gathered, which costs twice its
    reading again.
    """

    rows: int
    columns: int
    standing: bool

    @classmethod
    def of(cls, plan: BatchPlan, kv: KvCache, max_rows: int) -> GraphShape:
        """The smallest that the plan fits in; slots that stand close together may have idle ones between."""
        columns = min(bucket(plan.length, FEWEST_COLUMNS), kv.slot_tokens)
        rows, reach = bucket(len(plan.slots)), bucket(max(plan.slots) + 1)
        if reach <= min(2 * rows, bucket(max_rows), kv.slots):
            return cls(reach, columns, standing=True)
        return cls(rows, columns, standing=False)

    @classmethod
    def every(cls, kv: KvCache, max_rows: int) -> Iterator[GraphShape]:
        """All that `of` may give, those of few rows and columns first."""
        columns = min(FEWEST_COLUMNS, kv.slot_tokens)
        while True:
            rows = 1
            while rows <= bucket(max_rows):
                if rows <= kv.slots:
                    yield cls(rows, columns, standing=True)
                yield cls(rows, columns, standing=False)
                rows *= 2
            if columns == kv.slot_tokens:
                return
            columns = min(2 * columns, kv.slot_tokens)


class GraphRows:
    """Written before each step; the graph reads it on the device.

    Rows that are left over write where nobody looks: a gathered one into the spare slot, an idle slot into
    its spare column.
    """

    def __init__(self, kv: KvCache, shape: GraphShape, device: torch.device) -> None:
        assert kv.spare is not None, "rows that are left over need a place"
        assert kv.spare_column is not None
        self._kv, self._shape = kv, shape
        self._left_over = (0, kv.spare_column) if shape.standing else (kv.spare, 0)
        self._places_5R = torch.zeros(5, shape.rows, dtype=torch.long, device=device)
        self._places_5R[SLOT], self._places_5R[COLUMN] = self._left_over
        self._told_5R = host_like(self._places_5R)
        self._told_5R.copy_(self._places_5R)
        self.slot_R = torch.arange(shape.rows, device=device) if shape.standing else self._places_5R[SLOT]
        self.column_R = self._places_5R[COLUMN]
        """Where each row's new token goes."""
        self.position_R = self._places_5R[POSITION]
        self.adapter_R = self._places_5R[ADAPTER]
        """Each row's place in the bank of adapters."""

    def visible(self) -> Tensor:
        """(R, K): which columns count."""
        visible_SK = self._kv.visible_SL[:, : self._shape.columns]
        return visible_SK[: self._shape.rows] if self._shape.standing else visible_SK[self.slot_R]

    def seated(self, state_R1D: Tensor) -> Tensor:
        """The batch's rows, in the graph's order."""
        return state_R1D[self._places_5R[SLOT]] if self._shape.standing else state_R1D

    def answers(self, out_R1D: Tensor) -> Tensor:
        """The graph's rows, the batch's first, in its order."""
        return out_R1D[self._places_5R[ANSWER]] if self._shape.standing else out_R1D

    def place(self, plan: BatchPlan, positions_B1: Tensor | None) -> None:
        """On the host; the graph brings it to the device."""
        positions = plan.lengths if positions_B1 is None else positions_B1[:, 0].tolist()
        slot, column = self._left_over
        slots, columns = [slot] * self._shape.rows, [column] * self._shape.rows
        positions_of, answers = [0] * self._shape.rows, [0] * self._shape.rows
        adapters = [BARE_PLACE] * self._shape.rows
        for row, (place, length, position, adapter) in enumerate(
            zip(plan.slots, plan.lengths, positions, plan.adapter_slots, strict=True)
        ):
            at = place if self._shape.standing else row
            slots[at] = row if self._shape.standing else place
            columns[at], positions_of[at], answers[row] = length, position, at
            adapters[at] = adapter
        self._told_5R.copy_(torch.tensor([slots, columns, positions_of, answers, adapters]))

    def bring(self) -> None:
        """Copy to the device what was told last: a part of the graph."""
        self._places_5R.copy_(self._told_5R, non_blocking=self._places_5R.is_cuda)
