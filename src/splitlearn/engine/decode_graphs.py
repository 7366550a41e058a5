"""Decode steps at fixed shapes: on a GPU recorded once a shape as a CUDA graph, then launched at once.

The family's own forward launches a thousand kernels a step, one by one; for one new token a row the device
waits for them most of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import structlog
import torch
from torch import Tensor
from transformers import Cache

from splitlearn.engine.adapter_bank import AdapterBank
from splitlearn.engine.batch_plan import BatchPlan
from splitlearn.engine.kv_cache import KvCache
from splitlearn.model.decode_attention import attending_to_one_token
from splitlearn.model.first_steps import FirstSteps
from splitlearn.model.lora_bank import BARE_PLACE
from splitlearn.model.masks import ragged
from splitlearn.model.segments import TrunkSegment
from splitlearn.model.static_layer import FEWEST_COLUMNS, StaticLayer, bucket

# R rows of a bucket   B rows of a batch   D hidden   K columns

log = structlog.get_logger("splitlearn.engine")
WARM_UP = 2
SLOT, COLUMN, POSITION, ADAPTER = range(4)


class DecodeGraphs:
    """A graph for each bucket of rows and columns, made when the first batch needs it.

    Batches with adapters have graphs of their own, which read each row's place in the bank of adapters.

    A batch takes the smallest bucket that it fits in. Rows that are left over write into a slot that is
    nobody's. What cannot be recorded runs as it always did, after one warning.

    Args:
        trunk: of a family that may run in a batch.
        kv: with a slot to spare.
        bank: the adapters that rows may have.
        compiled: whether layers are compiled before they are recorded.
        max_rows: the largest batch.
    """

    def __init__(
        self, trunk: TrunkSegment, kv: KvCache, bank: AdapterBank, *, compiled: bool, max_rows: int
    ) -> None:
        self._trunk, self._kv, self._bank = trunk, kv, bank
        self._compiled = compiled
        self._max_rows = max_rows
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}
        self._banked: dict[tuple[int, int], DecodeGraph] = {}
        self._generation = bank.generation
        # One after another they run, so they may share what they compute in.
        self._pool = torch.cuda.graph_pool_handle() if trunk.device.type == "cuda" else None
        self.first_steps = FirstSteps(log, self._graphs.clear)
        self.banked_first_steps = FirstSteps(log, self._banked.clear)
        self.recorded = 0
        """How many graphs were made: in steady state this number stands still."""

    def first_steps_of(self, plan: BatchPlan) -> FirstSteps:
        return self.banked_first_steps if plan.has_adapters else self.first_steps

    def take(self, plan: BatchPlan, autocast: str) -> bool:
        """Whether this batch can run here."""
        fits = plan.tokens == 1 and len(plan.slots) <= self._max_rows
        with_places = bool(plan.adapter_slots)
        return fits and with_places and not autocast and not self.first_steps_of(plan).failed

    def run(self, plan: BatchPlan, activation_B1D: Tensor, positions_B1: Tensor | None) -> Tensor | None:
        """(B, 1, D) on the CPU, complete; None where it could not be recorded and nothing was changed."""
        try:
            graph = self._graph_for(plan)
        except Exception as error:
            self.first_steps_of(plan).give_up(error)
            return None
        return graph.run(plan, activation_B1D, positions_B1)

    def _graph_for(self, plan: BatchPlan) -> DecodeGraph:
        return self._graph(bucket(len(plan.slots)), self._columns(plan.length), banked=plan.has_adapters)

    def _columns(self, length: int) -> int:
        return min(bucket(length, FEWEST_COLUMNS), self._kv.slot_tokens)

    def _graph(self, rows: int, columns: int, *, banked: bool) -> DecodeGraph:
        graphs = self._over_the_bank() if banked else self._graphs
        graph = graphs.get((rows, columns))
        if graph is None:
            started = time.monotonic()
            graph = DecodeGraph(
                self._trunk,
                self._kv,
                rows,
                columns,
                bank=self._bank if banked else None,
                compiled=self._compiled,
                pool=self._pool,
            )
            graphs[rows, columns] = graph
            self.recorded += 1
            took_s = round(time.monotonic() - started, 2)
            log.info("decode graph recorded", rows=rows, columns=columns, adapters=banked, seconds=took_s)
        return graph

    def _over_the_bank(self) -> dict[tuple[int, int], DecodeGraph]:
        """Those that read the bank's memory as it is now; older ones go."""
        if self._generation != self._bank.generation:
            self._banked.clear()
            self._generation = self._bank.generation
        return self._banked


class DecodeGraph:
    """One step of up to `rows` rows that look at up to `columns` columns.

    With a bank, each row has the adapter of its place there; without, none has one.
    """

    def __init__(
        self,
        trunk: TrunkSegment,
        kv: KvCache,
        rows: int,
        columns: int,
        *,
        bank: AdapterBank | None = None,
        compiled: bool = False,
        pool: Any = None,
    ) -> None:
        assert kv.spare is not None, "rows that only fill a bucket up need a slot"
        device = trunk.device
        self._trunk, self._kv, self._bank = trunk, kv, bank
        self._rows, self._columns = rows, columns
        self._spare = kv.spare
        self._state_R1D = torch.zeros(rows, 1, trunk.hidden_size, dtype=trunk.dtype, device=device)
        self._places_4R = torch.zeros(4, rows, dtype=torch.long, device=device)
        self._places_4R[SLOT] = self._spare
        slot_R, column_R = self._places_4R[SLOT], self._places_4R[COLUMN]
        held = zip(kv.keys_SHLE, kv.values_SHLE, strict=True)
        self._cache = Cache(layers=[StaticLayer(*layer, slot_R, column_R, columns) for layer in held])
        self._forward: Callable[[], Tensor] = self._step
        self._replay: Callable[[], Tensor] = self._step
        if compiled:
            self._forward = torch.compile(self._step, dynamic=False)
        if device.type == "cuda":
            self._replay = self._record(pool)

    def run(self, plan: BatchPlan, activation_B1D: Tensor, positions_B1: Tensor | None) -> Tensor:
        rows = len(plan.slots)
        self._state_R1D[:rows].copy_(activation_B1D, non_blocking=True)
        self._places_4R.copy_(self._places(plan, positions_B1), non_blocking=True)
        out_R1D = self._replay()
        return out_R1D[:rows].cpu()

    def _places(self, plan: BatchPlan, positions_B1: Tensor | None) -> Tensor:
        left = self._rows - len(plan.slots)
        columns = [*plan.lengths, *[0] * left]
        positions = columns if positions_B1 is None else [*positions_B1[:, 0].tolist(), *[0] * left]
        adapters = [*plan.adapter_slots, *[BARE_PLACE] * left]
        places_4R = torch.tensor([[*plan.slots, *[self._spare] * left], columns, positions, adapters])
        return places_4R.pin_memory() if self._places_4R.is_cuda else places_4R

    def _step(self) -> Tensor:
        slot_R, column_R, position_R, adapter_R = self._places_4R
        adapters = nullcontext() if self._bank is None else self._bank.bound(adapter_R)
        visible_RK = self._kv.visible_SL[:, : self._columns].index_select(0, slot_R)
        with adapters, ragged(column_R[:, None], visible_RK), attending_to_one_token(self._trunk.causal_lm):
            return self._trunk(self._state_R1D, position_ids=position_R[:, None], past_key_values=self._cache)

    def _record(self, pool: Any) -> Callable[[], Tensor]:
        """Raises where the family's forward does what cannot be recorded, like a look at a value."""
        device = self._trunk.device
        beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                self._forward()
        torch.cuda.current_stream(device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on copying answers meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out_R1D = self._forward()

        def replay() -> Tensor:
            graph.replay()
            return out_R1D

        return replay
