"""Layers compiled for decode steps, put in and taken out of their modules at no cost."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from splitlearn.disk import cache_folder

SHAPES_KEPT = 256
ONE_ROW: Mapping[str, bool] = {"coordinate_descent_tuning": True}
"""Tuned, one row's products read the weights as fast as memory gives them; more rows gain nothing by it."""


class CompiledDecode:
    """Each layer is compiled by itself, with a cache of its own, so that layers of one kind share their code.

    Args:
        layers: with each layer's part of the cache.
        cache: what the family's forward hands to all of them.
        rows: of each step.
    """

    def __init__(
        self, layers: Iterable[tuple[nn.Module, CacheLayerMixin]], cache: Cache, *, rows: int
    ) -> None:
        keep_compiled_code()
        options: dict[str, Any] | None = dict(ONE_ROW) if rows == 1 else None
        self._forwards = [
            (layer, _with_own_cache(torch.compile(layer.forward, options=options), cache, OneLayer(part)))
            for layer, part in layers
        ]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the layers run compiled."""
        # A layer's index, which differs from layer to layer, would else be part of its code.
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=SHAPES_KEPT):
            for layer, forward in self._forwards:
                vars(layer)["forward"] = forward
            try:
                yield
            finally:
                for layer, _ in self._forwards:
                    del vars(layer)["forward"]


class OneLayer(Cache):
    """The cache as one layer sees it, whichever index it asks for."""

    def __init__(self, part: CacheLayerMixin) -> None:
        super().__init__(layers=[part])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.layers[0].update(key_states, value_states)


def _with_own_cache(forward: Callable[..., Any], cache: Cache, own: Cache) -> Callable[..., Any]:
    def with_own_cache(*args: Any, **kwargs: Any) -> Any:
        own_args = (own if value is cache else value for value in args)
        own_kwargs = {name: own if value is cache else value for name, value in kwargs.items()}
        return forward(*own_args, **own_kwargs)

    return with_own_cache


def keep_compiled_code() -> None:
    """Have compiled code outlive the process, where nobody has said where it is kept."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
