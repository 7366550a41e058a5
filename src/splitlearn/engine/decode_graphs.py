"""Decode steps at fixed shapes: on a GPU recorded once a shape as a CUDA graph, then launched at once.

The family's own forward launches a thousand kernels a step, one by one; for one new token a row the device
waits for them most of the time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import structlog
import torch
from torch import Tensor
from transformers import Cache

from splitlearn.engine.adapter_bank import AdapterBank
from splitlearn.engine.batch_plan import BatchPlan
from splitlearn.engine.graph_rows import GraphRows, GraphShape
from splitlearn.engine.kv_cache import KvCache
from splitlearn.errors import first_line
from splitlearn.model.compiled_decode import CompiledDecode
from splitlearn.model.decode_attention import attending_to_one_token
from splitlearn.model.first_steps import FirstSteps
from splitlearn.model.looks import CannotBeRecorded, NoLooks
from splitlearn.model.masks import ragged
from splitlearn.model.segments import TrunkSegment
from splitlearn.model.static_layer import StaticLayer
from splitlearn.wire.host_memory import host_like

# R rows of a graph   B rows of a batch   D hidden

log = structlog.get_logger("splitlearn.engine")
WARM_UP = 1
MEMORY_BYTES = 4 << 30
"""What all graphs may take of the device."""
HEADROOM_BYTES = 1 << 30
"""What they leave free there: a recording that finds no memory cannot be taken back."""


class DecodeGraphs:
    """A graph for each shape, recorded before the first session where there is a GPU.

    A batch takes the smallest shape that it fits in. What cannot be recorded runs as it always did, after one
    warning.

    Batches with adapters have graphs of their own, recorded when the first of a shape comes. They read each
    row's place in the bank of adapters, and their layers are not compiled.

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
        self._graphs: dict[GraphShape, DecodeGraph] = {}
        self._banked: dict[GraphShape, DecodeGraph] = {}
        self._generation = bank.generation
        # One after another they run, so they may share what they compute in.
        self._pool = torch.cuda.graph_pool_handle() if trunk.device.type == "cuda" else None
        self.first_steps = FirstSteps(log, self._graphs.clear)
        self.banked_first_steps = FirstSteps(log, self._banked.clear)
        self.recorded = 0
        """How many graphs were made: in steady state this number stands still."""
        self._taken_bytes = 0
        self._is_full = False

    def prepare(self) -> None:
        """Record every shape that a batch may have, so that no session waits for one.

        On a CPU, where nothing is recorded, each is made when it is needed.
        """
        if self._pool is None:
            return
        started = time.monotonic()
        try:
            with torch.inference_mode():
                for shape in GraphShape.every(self._kv, self._max_rows):
                    self._graph_of(shape)
        except Exception as error:
            self.first_steps.give_up(error)
        seconds = round(time.monotonic() - started, 1)
        log.info("decode graphs recorded", graphs=len(self._graphs), bytes=self._taken_bytes, seconds=seconds)

    def first_steps_of(self, plan: BatchPlan) -> FirstSteps:
        return self.banked_first_steps if plan.has_adapters else self.first_steps

    def take(self, plan: BatchPlan, autocast: str) -> bool:
        """Whether this batch can run here."""
        fits = plan.tokens == 1 and len(plan.slots) <= self._max_rows
        has_places = bool(plan.adapter_slots)
        return fits and has_places and not autocast and not self.first_steps_of(plan).failed

    def run(self, plan: BatchPlan, activation_B1D: Tensor, positions_B1: Tensor | None) -> Tensor | None:
        """(B, 1, D) on the CPU, complete; None where it could not be recorded and nothing was changed."""
        try:
            shape = GraphShape.of(plan, self._kv, self._max_rows)
            graph = self._graph_of(shape, banked=plan.has_adapters)
        except Exception as error:
            self.first_steps_of(plan).give_up(error)
            return None
        return None if graph is None else graph.run(plan, activation_B1D, positions_B1)

    def _graph_of(self, shape: GraphShape, *, banked: bool = False) -> DecodeGraph | None:
        """None where the graphs have all the memory that they may have."""
        graphs = self._over_the_bank() if banked else self._graphs
        graph = graphs.get(shape)
        if graph is None and not self._is_full:
            before = self._free_bytes()
            graph = graphs[shape] = self._new_graph(shape, self._bank if banked else None)
            self.recorded += 1
            free = self._free_bytes()
            self._taken_bytes += max(before - free, 0)
            self._is_full = self._pool is not None and (
                self._taken_bytes >= MEMORY_BYTES or free < HEADROOM_BYTES
            )
            if self._is_full:
                log.warning(
                    "decode graphs have all the memory they may have: other shapes run kernel by kernel",
                    graphs=self.recorded,
                    bytes=self._taken_bytes,
                )
        return graph

    def _over_the_bank(self) -> dict[GraphShape, DecodeGraph]:
        """Those that read the bank's memory as it is now; older ones go."""
        if self._generation != self._bank.generation:
            self._banked.clear()
            self._generation = self._bank.generation
        return self._banked

    def _new_graph(self, shape: GraphShape, bank: AdapterBank | None) -> DecodeGraph:
        compiled = self._compiled and bank is None

        def new_graph() -> DecodeGraph:
            return DecodeGraph(self._trunk, self._kv, shape, bank=bank, compiled=compiled, pool=self._pool)

        try:
            return new_graph()
        except CannotBeRecorded:
            raise
        except Exception as error:
            if not compiled:
                raise
            reason = first_line(error)
            log.warning("layers could not be compiled for decode steps and run as they are", error=reason)
            self._compiled = compiled = False
            return new_graph()

    def _free_bytes(self) -> int:
        device = self._trunk.device
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


class DecodeGraph:
    """One step of the rows of one shape; with a bank, each has the adapter of its place there."""

    def __init__(
        self,
        trunk: TrunkSegment,
        kv: KvCache,
        shape: GraphShape,
        *,
        bank: AdapterBank | None = None,
        compiled: bool = False,
        pool: Any = None,
    ) -> None:
        device = trunk.device
        self._trunk, self._bank = trunk, bank
        self._state_R1D = torch.zeros(shape.rows, 1, trunk.hidden_size, dtype=trunk.dtype, device=device)
        # Copies are a part of the graph: each of its own would cost a launch, with the device idle.
        self._asked_R1D, self._answer_R1D = host_like(self._state_R1D), host_like(self._state_R1D)
        self._rows = GraphRows(kv, shape, device)
        held = zip(kv.keys_SHLE, kv.values_SHLE, strict=True)
        slot_R, column_R = self._rows.slot_R, self._rows.column_R
        self._cache = Cache(
            layers=[
                StaticLayer(keys, values, slot_R, column_R, shape.columns, standing=shape.standing)
                for keys, values in held
            ]
        )
        self._compiled = (
            CompiledDecode(zip(trunk.layers, self._cache.layers, strict=True), self._cache, rows=shape.rows)
            if compiled
            else None
        )
        self._replay: Callable[[], object] = self._step
        if device.type == "cuda":
            self._replay = self._record(pool)
        elif compiled:
            # Compiled now, where a failure has somebody to deal with it.
            with torch.inference_mode():
                self._step()

    def run(self, plan: BatchPlan, activation_B1D: Tensor, positions_B1: Tensor | None) -> Tensor:
        rows = len(plan.slots)
        self._asked_R1D[:rows].copy_(activation_B1D)
        self._rows.place(plan, positions_B1)
        self._replay()
        if self._state_R1D.is_cuda:
            torch.cuda.current_stream(self._trunk.device).synchronize()
        return self._answer_R1D[:rows].clone()

    def _step(self) -> Tensor:
        """From what the host was told to the answer there, which is complete when the device has done it."""
        self._state_R1D.copy_(self._asked_R1D, non_blocking=self._state_R1D.is_cuda)
        self._rows.bring()
        with self._compiled.in_place() if self._compiled else contextlib.nullcontext():
            return self._answer_R1D.copy_(self._plain_step(), non_blocking=self._state_R1D.is_cuda)

    def _plain_step(self) -> Tensor:
        rows, trunk = self._rows, self._trunk
        with (
            ragged(rows.column_R[:, None], rows.visible()),
            attending_to_one_token(trunk.causal_lm),
            self._bank.bound(rows.adapter_R) if self._bank else contextlib.nullcontext(),
        ):
            out_R1D = trunk(
                rows.seated(self._state_R1D),
                position_ids=rows.position_R[:, None],
                past_key_values=self._cache,
            )
        return rows.answers(out_R1D)

    def _record(self, pool: Any) -> Callable[[], object]:
        """Raises CannotBeRecorded where the family's forward looks at a value."""
        device = self._trunk.device
        beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            with NoLooks():
                self._plain_step()
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream(device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
        try:
            # Other threads go on copying answers meanwhile. A recording that fails leaves its stream current.
            with torch.cuda.stream(torch.cuda.current_stream(device)), recording:
                self._step()
        except Exception as error:
            raise CannotBeRecorded(f"the recording failed: {error}") from error
        replay: Callable[[], object] = graph.replay
        return replay
