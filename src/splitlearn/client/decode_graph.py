"""The client's part of a decode step at one fixed shape, in memory that a cache is lent."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from splitlearn.client.call_context import Call, CallContext
from splitlearn.client.leased_layer import Held, Lease
from splitlearn.client.recorded_step import Across, OnTheHost, Recorded
from splitlearn.model.compiled_decode import CompiledDecode
from splitlearn.model.looks import NoLooks
from splitlearn.model.masks import ragged
from splitlearn.model.static_layer import StaticLayer

# B rows   T 1   D hidden   V vocabulary   K columns

WARM_UP = 1


class DecodeGraph:
    """One new token for each of B rows that look at up to K columns, in memory of its own."""

    def __init__(
        self,
        step: Callable[..., Any],
        context: CallContext,
        layers: int,
        held: Held,
        ids_B1: Tensor,
        columns: int,
        compiled: Mapping[int, nn.Module],
    ) -> None:
        rows, device = ids_B1.shape[0], ids_B1.device
        self.held = held
        self._family_step, self._context = step, context
        self._ids_B1 = torch.zeros_like(ids_B1)
        self._column_B = torch.zeros(rows, dtype=torch.long, device=device)
        self._position_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._visible_BK = torch.ones(rows, columns, dtype=torch.bool, device=device)
        every_B = torch.arange(rows, device=device)
        first = next(iter(held.values()))
        self._cache = Cache(
            layers=[
                StaticLayer(*held.get(index, first), every_B, self._column_B, columns, standing=True)
                for index in range(layers)
            ]
        )
        parts = [(layer, self._cache.layers[index]) for index, layer in compiled.items()]
        self._compiled = CompiledDecode(parts, self._cache, rows=rows) if parts else None
        self._lease: weakref.ref[Lease] | None = None
        self._recorded: Recorded | None = self._record() if device.type == "cuda" else None

    @property
    def lease(self) -> Lease | None:
        """Who stands on its memory now."""
        return None if self._lease is None else self._lease()

    def lend(self, lease: Lease) -> None:
        self._lease = weakref.ref(lease)

    def place(self, ids_B1: Tensor, column: int, call: Call) -> None:
        """Say what the next step's token is, where it goes and what it may look at."""
        self._ids_B1.copy_(ids_B1)
        self._column_B.fill_(column)
        if call.positions_BT is None:
            self._position_B1.fill_(column)
        else:
            self._position_B1.copy_(call.positions_BT)
        if call.mask_BL is None:
            self._visible_BK.fill_(True)
        else:
            self._visible_BK[:, : column + 1].copy_(call.mask_BL)

    def seen_from_host(self, call: Call) -> Call:
        """The same call, told by what is on the host when `across` is asked: to look there costs no wait."""
        if self._recorded is None:
            return call
        host = self._recorded.host
        mask_BL = None if host.is_unpadded else call.mask_BL
        return Call(mask_BL, None if call.positions_BT is None else host.positions_B1, call.cache)

    def run(self, across: Across) -> Any:
        """The family's answer, its logits (B, 1, V) in memory of their own."""
        if self._recorded is None:
            with self._context.standing_in(across):
                return self._step()
        return self._recorded.run(across)

    def _step(self) -> Any:
        with self._compiled.in_place() if self._compiled else contextlib.nullcontext():
            return self._plain_step()

    def _plain_step(self) -> Any:
        with ragged(self._column_B[:, None], self._visible_BK):
            return self._family_step(
                input_ids=self._ids_B1,
                position_ids=self._position_B1,
                past_key_values=self._cache,
                use_cache=True,
            )

    def _record(self) -> Recorded:
        """Raises CannotBeRecorded where the family's forward looks at a value."""
        met: list[OnTheHost] = []

        def stand_in(hidden_B1D: Tensor) -> Tensor:
            met.append(OnTheHost(hidden_B1D, self._position_B1, self._visible_BK))
            return hidden_B1D

        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            with self._context.standing_in(stand_in):
                with NoLooks():
                    self._plain_step()
                for _ in range(WARM_UP):
                    self._step()
            torch.cuda.current_stream().synchronize()
            recorded = Recorded(self._step, self._context.standing_in, met[-1])
        torch.cuda.current_stream().wait_stream(beside)
        return recorded
