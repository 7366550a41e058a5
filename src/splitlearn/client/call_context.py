"""What one call of the model was given, kept for the remote layer that only sees hidden states."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, StaticCache

from splitlearn.errors import UnsupportedCall, too_long_for_model
from splitlearn.model.stand_in import argument_names

# B rows   T new tokens   L tokens in all


@dataclass(frozen=True, slots=True)
class Call:
    """One forward of the decoder: `mask_BL` as the caller gave it, before the library makes it 4-D."""

    mask_BL: Tensor | None
    positions_BT: Tensor | None
    cache: Cache | None


class CallContext(threading.local):
    """The call that runs on this thread; several threads may generate with one model."""

    def __init__(self) -> None:
        self.stack: list[Call] = []
        self.stand_in: Callable[[Tensor], Tensor] | None = None
        """What answers in the trunk's place, where a graph is recorded or compared."""

    @contextmanager
    def standing_in(self, stand_in: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within it, on this thread, this answers in the trunk's place."""
        self.stand_in = stand_in
        try:
            yield
        finally:
            self.stand_in = None

    @property
    def call(self) -> Call:
        assert self.stack, "the remote layer runs inside a call of its decoder"
        return self.stack[-1]


def watch(
    decoder: nn.Module,
    config: PreTrainedConfig,
    max_positions: int | None,
    trains: Callable[[], bool] = lambda: False,
) -> CallContext:
    """Note every call of this decoder, and refuse those whose result would be wrong.

    Where the model `trains`, a call gets no cache unless it wants one: training and evaluation need none.
    """
    context = CallContext()
    names = argument_names(decoder)

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        # Some families hand the token ids over by position.
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        without = module.training or (trains() and not kwargs.get("use_cache"))
        cache = _cache_of(kwargs, config, without=without)
        call = Call(_mask_of(kwargs), kwargs.get("position_ids"), cache)
        _refuse_unsupported(kwargs, config)
        _require_positions(kwargs, cache, max_positions)
        context.stack.append(call)
        return (), kwargs

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if context.stack:
            context.stack.pop()

    decoder.register_forward_pre_hook(before, with_kwargs=True)
    decoder.register_forward_hook(after, always_call=True)
    return context


def _cache_of(kwargs: dict[str, Any], config: PreTrainedConfig, *, without: bool) -> Cache | None:
    """The call's cache, made here if the call wants one and brings none."""
    cache: Cache | None = kwargs.get("past_key_values")
    if isinstance(cache, StaticCache):
        raise UnsupportedCall(
            'a static cache cannot hold the trunk\'s session: leave out cache_implementation="static"'
        )
    if getattr(cache, "offloading", False):
        raise UnsupportedCall(
            "an offloaded cache fetches the layers one by one and would miss the first after the trunk: "
            'leave out cache_implementation="offloaded"'
        )
    if cache is not None:
        return cache
    wanted = kwargs.get("use_cache")
    if without or not (config.use_cache if wanted is None else wanted):
        # The library would otherwise fill a cache that lacks the trunk's part.
        kwargs["use_cache"] = False
        return None
    cache = kwargs["past_key_values"] = DynamicCache(config=config)
    return cache


def _mask_of(kwargs: dict[str, Any]) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UnsupportedCall(
            "the trunk derives its mask from a 2-D attention_mask (rows x tokens, 1 where a token counts): "
            "pass that one"
        )
    return mask


def _refuse_unsupported(kwargs: dict[str, Any], config: PreTrainedConfig) -> None:
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        asked = kwargs.get(name)
        if getattr(config, name, False) if asked is None else asked:
            raise UnsupportedCall(f"{name} would lack the trunk's layers, which are not here: leave it out")


def _require_positions(kwargs: dict[str, Any], cache: Cache | None, max_positions: int | None) -> None:
    """Before the embedding of a position that the model does not have fails with an index error."""
    given = kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    if max_positions is None or given is None:
        return
    length = given.shape[1] + (cache.get_seq_length() if cache is not None else 0)
    if length > max_positions:
        raise too_long_for_model(length, max_positions)
