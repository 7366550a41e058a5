"""What the runner is to do now, as a plain value that several devices could follow alike."""

from __future__ import annotations

from dataclasses import dataclass

from splitlearn.vocabulary import Phase


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One forward through the trunk: row i lies in `slots[i]` and already holds `lengths[i]` tokens.

    Every row gets `tokens` new ones. `steps` names the steps in the order of their rows, `step_rows`
    how many rows each has. `adapter_slots` is each row's place in the bank of adapters, 0 the bare base
    model; it is empty where all rows have one adapter that is in no bank.
    """

    steps: tuple[int, ...]
    step_rows: tuple[int, ...]
    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: int
    adapter_slots: tuple[int, ...]
    phase: Phase = Phase.FORWARD

    def __post_init__(self) -> None:
        rows = len(self.slots)
        assert rows == sum(self.step_rows) == len(self.lengths)
        assert len(self.adapter_slots) in (0, rows)
        assert len(set(self.slots)) == rows

    @property
    def ragged(self) -> bool:
        """Whether rows differ in length, so that the library's own masks do not fit."""
        return len(set(self.lengths)) > 1

    @property
    def has_adapters(self) -> bool:
        """Whether any row has an adapter that is in the bank."""
        return any(self.adapter_slots)

    @property
    def mixed(self) -> bool:
        """Whether rows differ in their adapter."""
        return len(set(self.adapter_slots)) > 1

    @property
    def length(self) -> int:
        """Columns of the longest row once its new tokens are written."""
        return max(self.lengths) + self.tokens

    @property
    def contiguous(self) -> bool:
        """Whether the slots are neighbours in order: the batch is then a view, not a copy."""
        first = self.slots[0]
        return self.slots == tuple(range(first, first + len(self.slots)))


@dataclass(slots=True)
class BatchCounts:
    """How many plans were run, of how many steps and rows, and how long the device worked on them.

    `shared` are the plans of more than one session, `mixed` those of more than one adapter.
    """

    batches: int = 0
    shared: int = 0
    ragged: int = 0
    mixed: int = 0
    steps: int = 0
    rows: int = 0
    device_us: int = 0

    def note(self, plan: BatchPlan, device_us: int) -> None:
        self.batches += 1
        self.steps += len(plan.steps)
        self.rows += len(plan.slots)
        self.device_us += device_us
        self.shared += len(plan.steps) > 1
        self.ragged += plan.ragged
        self.mixed += plan.mixed
