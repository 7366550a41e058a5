"""Runs a batch through the trunk: nothing here knows sessions, only slots and lengths."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from splitlearn.config import SessionConfig
from splitlearn.engine.adapter_bank import AdapterBank
from splitlearn.engine.batch_plan import BatchPlan
from splitlearn.engine.decode_graphs import DecodeGraphs
from splitlearn.engine.kv_cache import KvCache, LayerShape
from splitlearn.engine.slot_cache import SlotCache
from splitlearn.engine.trunk_state import BARE, AdapterVersion, TrunkState
from splitlearn.model.first_steps import FirstSteps
from splitlearn.model.masks import ragged
from splitlearn.model.segments import TrunkSegment
from splitlearn.wire.dtypes import dtype_named

# B rows   T new tokens   D hidden   K columns


@dataclass(frozen=True, slots=True)
class Ran:
    """What a forward gave, and how long the device worked on it."""

    activation_BTD: Tensor
    device_us: int


class Runner:
    """The trunk with its KV cache."""

    def __init__(
        self,
        trunk: TrunkSegment,
        kv: KvCache,
        state: TrunkState,
        bank: AdapterBank,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._bank = bank
        self._trunk = trunk
        self._graphs = graphs
        self._state = state
        self._kv = kv
        self._cache = SlotCache(kv, list(trunk.sliding_window))

    def places(self, versions: Sequence[AdapterVersion]) -> tuple[int, ...]:
        """The plan's places of these adapters in the bank; nothing where one adapter is bound for all."""
        return self._bank.places(versions, even_one=self._graphs is not None)

    def run(
        self,
        plan: BatchPlan,
        activation_BTD: Tensor,
        positions_BT: Tensor | None,
        *,
        padded: bool,
        adapter: AdapterVersion | None = BARE,
        autocast: str = "",
    ) -> Ran:
        """Forward of the plan's rows, their keys and values written into their slots.

        `positions_BT` is None where each row's positions go on from its length; `padded` says
        whether any row has tokens that may not be looked at. `adapter` is that of all rows; None takes
        each row's from the bank.
        """
        decoded = self._decode(plan, activation_BTD, positions_BT, autocast)
        if decoded is not None and self._first_steps(plan).proven:
            return decoded
        self._state.set(adapter or BARE)
        with contextlib.nullcontext() if adapter else self._bank.bound(self._on_device(plan.adapter_slots)):
            ran = self._run_family(plan, activation_BTD, positions_BT, padded=padded, autocast=autocast)
        if decoded is not None:
            self._first_steps(plan).compare((decoded.activation_BTD, ran.activation_BTD))
        return ran

    def _on_device(self, places: tuple[int, ...]) -> Tensor:
        return torch.tensor(places, device=self._trunk.device)

    def _decode(
        self,
        plan: BatchPlan,
        activation_BTD: Tensor,
        positions_BT: Tensor | None,
        autocast: str,
    ) -> Ran | None:
        """The plan's rows at a fixed shape; None where they do not fit one."""
        if self._graphs is None or not self._graphs.take(plan, autocast):
            return None
        self._state.set(BARE)
        with torch.inference_mode(), timed(self._trunk.device) as clock:
            out_BTD = self._graphs.run(plan, activation_BTD, positions_BT)
        return None if out_BTD is None else Ran(out_BTD, clock.us)

    def _run_family(
        self,
        plan: BatchPlan,
        activation_BTD: Tensor,
        positions_BT: Tensor | None,
        *,
        padded: bool,
        autocast: str,
    ) -> Ran:
        columns_BT = self._cache.begin(plan)
        visible_BK = self._kv.visible_SL[list(plan.slots), : plan.length] if padded else None
        with self._ready(autocast), timed(self._trunk.device) as clock:
            if plan.ragged:
                with ragged(columns_BT.to(self._trunk.device), visible_BK):
                    out_BTD = self._forward(activation_BTD, None, positions_BT, columns_BT)
            else:
                # Some families compute on the mask, so it goes as the numbers they are used to.
                mask_BK = None if visible_BK is None else visible_BK.long()
                out_BTD = self._forward(activation_BTD, mask_BK, positions_BT, columns_BT)
        return Ran(out_BTD, clock.us)

    def run_without_cache(
        self,
        activation_BTD: Tensor,
        mask_BT: Tensor | None,
        positions_BT: Tensor | None,
        *,
        autocast: str = "",
    ) -> Ran:
        """Forward of whole sequences; nothing is kept."""
        device = self._trunk.device
        self._state.set(BARE)
        with self._ready(autocast), timed(device) as clock:
            out_BTD = self._trunk(
                activation_BTD.to(device, self._trunk.dtype),
                attention_mask=None if mask_BT is None else mask_BT.long().to(device),
                position_ids=_positions(activation_BTD, positions_BT).to(device),
            )
        return Ran(out_BTD, clock.us)

    def _forward(
        self, activation_BTD: Tensor, mask_BK: Tensor | None, positions_BT: Tensor | None, columns_BT: Tensor
    ) -> Tensor:
        device = self._trunk.device
        out_BTD: Tensor = self._trunk(
            activation_BTD.to(device, self._trunk.dtype),
            attention_mask=mask_BK,
            position_ids=(columns_BT if positions_BT is None else positions_BT).to(device),
            past_key_values=self._cache,
        )
        return out_BTD

    def _first_steps(self, plan: BatchPlan) -> FirstSteps:
        assert self._graphs is not None, "a step was taken at a fixed shape"
        return self._graphs.first_steps_of(plan)

    @contextlib.contextmanager
    def _ready(self, autocast: str) -> Iterator[None]:
        kind = dtype_named(autocast) if autocast else None
        with torch.inference_mode(), torch.autocast(self._trunk.device.type, kind, enabled=kind is not None):
            yield


@dataclass(slots=True)
class Clock:
    """Microseconds, once what is timed is done."""

    us: int = 0


@contextlib.contextmanager
def timed(device: torch.device) -> Iterator[Clock]:
    """How long the device works on what is done within."""
    clock = Clock()
    started = time.perf_counter()
    yield clock
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock.us = int((time.perf_counter() - started) * 1e6)


def measure_layers(trunk: TrunkSegment) -> list[LayerShape]:
    """What each layer keeps of a token, learnt from one token through the trunk."""
    cache = DynamicCache(config=trunk.config)
    token_BTD = torch.zeros(1, 1, trunk.hidden_size, dtype=trunk.dtype, device=trunk.device)
    with torch.inference_mode():
        trunk(
            token_BTD,
            position_ids=torch.zeros(1, 1, dtype=torch.long, device=trunk.device),
            past_key_values=cache,
        )
    return [
        LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        for layer in cache.layers[: trunk.num_layers]
    ]


def _positions(activation_BTD: Tensor, positions_BT: Tensor | None) -> Tensor:
    if positions_BT is not None:
        return positions_BT
    rows, tokens = activation_BTD.shape[:2]
    return torch.arange(tokens).expand(rows, tokens)


def kv_cache_of(trunk: TrunkSegment, config: SessionConfig, *, spare: bool) -> KvCache:
    """The slots that this budget gives the trunk's sessions."""
    tokens = min(config.session_tokens, trunk.max_positions or config.session_tokens)
    return KvCache(
        measure_layers(trunk),
        budget_bytes=config.kv_budget_bytes,
        slot_tokens=tokens,
        dtype=trunk.dtype,
        device=trunk.device,
        spare=spare,
    )
