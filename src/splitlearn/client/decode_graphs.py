"""The client's part of a decode step at fixed shapes: on a GPU two CUDA graphs, below and above the cut.

One pass through the family's own forward is recorded, parted where the trunk's stand-in is met. Then a step
is two launches around the call to the trunk, in place of a hundred kernels and their Python.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import structlog
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from splitlearn.client.call_context import Call, CallContext
from splitlearn.client.decode_graph import DecodeGraph
from splitlearn.client.leased_layer import Held, Lease, LeasedLayer
from splitlearn.model.decode_attention import attending_to_one_token
from splitlearn.model.first_steps import FirstSteps
from splitlearn.model.skeleton import decoder_of, layers_of
from splitlearn.model.static_layer import FEWEST_COLUMNS, bucket

# B rows   T 1   D hidden   V vocabulary   K columns   L tokens with the new one

log = structlog.get_logger("splitlearn.client")
GRAPHS_KEPT = 8
TAKEN = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"})
IGNORED = frozenset({"return_dict", "logits_to_keep"})
"""Without a meaning where there is one new token."""


class ClientGraphs:
    """Takes the steps that it can, and leaves the others to the family's own forward.

    Args:
        model: the client's model; its attention implementation is one whose masks are known.
        context: of the calls of its decoder.
        trunk: the layers that are not here.
        exchange: what the remote layer does with an activation.
        max_positions: the longest text, where there is a limit.
        compiled: whether layers are compiled before they are recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        context: CallContext,
        trunk: range,
        exchange: Callable[[Tensor, Call], Tensor],
        max_positions: int | None,
        *,
        compiled: bool = False,
    ) -> None:
        self._forward = _forward_of(model)
        self._config = model.config
        self._model = weakref.ref(model)
        self._context, self._exchange = context, exchange
        layers = model.config.num_hidden_layers
        self._own = [index for index in range(layers) if index not in trunk]
        self._layers = layers
        decoder_layers = list(layers_of(decoder_of(model)))
        self._compiled = {index: decoder_layers[index] for index in self._own} if compiled else {}
        self._max_positions = max_positions
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}
        self._lock = threading.Lock()
        self.first_steps = FirstSteps(log, self._graphs.clear)
        self.steps = 0
        """Steps that were taken here."""

    def step(self, asked: dict[str, Any]) -> Any | None:
        """The forward's answer to these arguments; None where it is not a step for a graph."""
        if self.first_steps.failed or not _is_decode_step(asked) or not self._lock.acquire(blocking=False):
            return None
        try:
            # What a graph stands on outlives the call: it is no inference tensor, whatever the caller's mode.
            with torch.inference_mode(False), torch.no_grad(), _on(asked["input_ids"].device):
                return self._step(asked)
        finally:
            self._lock.release()

    def _step(self, asked: dict[str, Any]) -> Any | None:
        cache, ids_B1 = asked["past_key_values"], asked["input_ids"]
        if not self._can_lease(cache, ids_B1.shape[0]):
            return None
        before = None if self.first_steps.proven else self._copy(cache)
        try:
            graph, lease = self._leased(cache, ids_B1)
        except Exception as error:
            self.first_steps.give_up(error)
            return None
        call = Call(asked.get("attention_mask"), asked.get("position_ids"), cache)
        if graph is None or lease is None or not _fits(call.mask_BL, len(ids_B1), lease.length + 1):
            return None
        graph.place(ids_B1, lease.length, call)
        # Counted before the trunk has it, as in the family's own forward: a call that fails tears the cache.
        lease.length += 1
        self.steps += 1
        if before is None:
            answer = graph.run(lambda hidden_B1D: self._exchange(hidden_B1D, graph.seen_from_host(call)))
        else:
            answer = self._proven_step(graph, lease, call, asked | {"past_key_values": before})
        answer["past_key_values"] = cache
        return answer

    def _can_lease(self, cache: Cache, rows: int) -> bool:
        """Whether the cache holds a prompt, in layers whose columns are all there."""
        if len(cache.layers) < self._layers:
            return False
        layers = [cache.layers[index] for index in self._own]
        kinds = all(type(layer) in (DynamicLayer, LeasedLayer) and layer.is_initialized for layer in layers)
        return kinds and all(layer.keys is not None and len(layer.keys) == rows for layer in layers)

    def _leased(self, cache: Cache, ids_B1: Tensor) -> tuple[DecodeGraph | None, Lease | None]:
        """The graph whose memory the cache stands on, or is moved to; None where another cache has it."""
        first = cache.layers[self._own[0]]
        length = int(first.get_seq_length()) + 1
        columns = bucket(length, FEWEST_COLUMNS)
        if self._max_positions is not None:
            columns = min(columns, self._max_positions)
            if length > columns:
                return None, None
        rows = ids_B1.shape[0]
        # The last used is the last to be let go.
        graph = self._graphs.pop((rows, columns), None)
        if graph is not None:
            self._graphs[rows, columns] = graph
        leases = {getattr(cache.layers[index], "lease", None) for index in self._own}
        lease = leases.pop()
        if graph is not None and lease is not None and graph.lease is lease and not leases:
            return graph, lease
        if graph is None:
            self._let_one_go()
            graph = self._graphs[rows, columns] = self._new_graph(cache, ids_B1, columns)
        if graph.lease is not None:
            return None, None
        lease = Lease(graph.held, length - 1)
        for index in self._own:
            layer = cache.layers[index]
            if not isinstance(layer, LeasedLayer):
                layer = cache.layers[index] = LeasedLayer(index, layer)
            layer.move_into(lease)
        graph.lend(lease)
        return graph, lease

    def _let_one_go(self) -> None:
        """Where there are enough, the one that was not used for longest; a cache in use keeps its memory."""
        if len(self._graphs) >= GRAPHS_KEPT:
            self._graphs.pop(next(iter(self._graphs)))

    def _new_graph(self, cache: Cache, ids_B1: Tensor, columns: int) -> DecodeGraph:
        held: Held = {}
        for index in self._own:
            layer = cache.layers[index]
            held[index] = (_room(layer.keys, columns), _room(layer.values, columns))
        return DecodeGraph(
            self._family_step, self._context, self._layers, held, ids_B1, columns, self._compiled
        )

    def _family_step(self, **asked: Any) -> Any:
        model = self._model()
        assert model is not None
        with torch.no_grad(), attending_to_one_token(model):
            return self._forward(**asked)

    def _copy(self, cache: Cache) -> DynamicCache:
        copied = DynamicCache(config=self._config)
        for index in self._own:
            layer, own = cache.layers[index], copied.layers[index]
            own.lazy_initialization(layer.keys, layer.values)
            own.keys, own.values = layer.keys.clone(), layer.values.clone()
        return copied

    def _proven_step(self, graph: DecodeGraph, lease: Lease, call: Call, asked: dict[str, Any]) -> Any:
        """The family's own step, on a copy of the cache, and the graph's compared with it.

        What the trunk is sent, what the answer is and what the cache keeps are the family's.
        """
        hidden: list[Tensor] = []
        received: list[Tensor] = []

        def across(hidden_B1D: Tensor) -> Tensor:
            hidden.append(hidden_B1D)
            received.append(self._exchange(hidden_B1D, call))
            return received[0]

        def note(hidden_B1D: Tensor) -> Tensor:
            hidden.append(hidden_B1D.clone())
            return received[0]

        with self._context.standing_in(across):
            expected = self._forward(**asked)
        found = graph.run(note)
        theirs_B1D, ours_B1D = hidden
        self.first_steps.compare((ours_B1D, theirs_B1D), (found["logits"], expected["logits"]))
        lease.keep(asked["past_key_values"])
        return expected


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Streams and graphs are those of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _fits(mask_BL: Tensor | None, rows: int, length: int) -> bool:
    """Whether the mask is one of the whole text; the family's own forward says what is wrong with another."""
    return mask_BL is None or tuple(mask_BL.shape) == (rows, length)


def _room(held_BHLE: Tensor, columns: int) -> Tensor:
    return held_BHLE.new_zeros(*held_BHLE.shape[:2], columns, held_BHLE.shape[3])


def _is_decode_step(asked: dict[str, Any]) -> bool:
    given = {name for name, value in asked.items() if value is not None}
    ids, cache = asked.get("input_ids"), asked.get("past_key_values")
    if not given <= TAKEN | IGNORED or not isinstance(ids, Tensor) or type(cache) is not DynamicCache:
        return False
    mask_BL = asked.get("attention_mask")
    two_dimensional = mask_BL is None or (isinstance(mask_BL, Tensor) and mask_BL.ndim == 2)
    wanted = asked.get("use_cache") is not False and asked.get("return_dict") is not False
    return ids.shape[1] == 1 and two_dimensional and wanted and not torch.is_grad_enabled()


def _forward_of(model: PreTrainedModel) -> Callable[..., Any]:
    """The forward of the model's class as it is now; the model may be collected meanwhile."""
    forward, held = type(model).forward, weakref.ref(model)
    return lambda **asked: forward(held(), **asked)


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model is told where its tokens stand, as a graph tells it."""
    return "position_ids" in inspect.signature(type(model).forward).parameters
