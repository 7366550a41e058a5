"""The cache's layer k is the session: beams, forks, crops and repeats reach the trunk through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from splitlearn.client.session import ClientSession
from splitlearn.client.transport import Transport
from splitlearn.errors import UnsupportedCall
from splitlearn.wire.messages import OpenSession

AnyCache = TypeVar("AnyCache", bound=Cache)


class RemoteCacheLayer(CacheLayerMixin):
    """Owns the server's session; the library's `Cache` treats it like any other layer.

    A deep copy forks the session, and the last reference to it closes the session.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(
        self, transport: Transport, opening: OpenSession, session: ClientSession | None = None
    ) -> None:
        super().__init__()
        self.is_initialized = True
        self._transport = transport
        self._opening = opening
        self.session = session or ClientSession(transport, opening)

    def get_seq_length(self, *args: Any) -> int:
        return self.session.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.session.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens off the end: a negative count of them, or (until 5.17) the length to keep."""
        count = int(tokens_to_remove)
        self.session.crop(max(self.session.length + count, 0) if count <= 0 else count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.session.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.session.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.session.select(torch.arange(self.session.rows)[indices.cpu()])

    def activate_past_recording(self) -> None:
        """The trunk keeps all that it was given: any crop is possible at any time."""

    def reset(self) -> None:
        self.session = ClientSession(self._transport, self._opening)

    def offload(self) -> None:
        """Nothing of the trunk's cache is here."""

    prefetch = offload

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise UnsupportedCall(
            "past_key_values belongs to a split model: a whole model needs a cache of its own"
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("the trunk's keys and values never come here")

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteCacheLayer:
        return RemoteCacheLayer(self._transport, self._opening, self.session.fork())


class InertLayer(RemoteCacheLayer):
    """Stands for the trunk's other layers: as long as the session, and holding nothing."""

    def __init__(self, remote: RemoteCacheLayer) -> None:
        CacheLayerMixin.__init__(self)
        self.is_initialized = True
        self._remote = remote

    @property
    def session(self) -> ClientSession:  # type: ignore[override]
        return self._remote.session

    def crop(self, tokens_to_remove: int) -> None: ...
    def reorder_cache(self, beam_idx: Tensor) -> None: ...
    def batch_repeat_interleave(self, repeats: int) -> None: ...
    def batch_select_indices(self, indices: Tensor) -> None: ...
    def reset(self) -> None: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> InertLayer:
        return InertLayer(memo[id(self._remote)])


def session_of(
    cache: Cache, trunk: range, transport: Transport, opening: Callable[[], OpenSession] = OpenSession
) -> ClientSession:
    """The session in this cache, put there at the cache's first use and opened as `opening` says.

    Raises:
        UnsupportedCall: the cache was filled by another model, or is of a kind that is not supported.
    """
    if len(cache.layers) > trunk.start:
        layer = cache.layers[trunk.start]
        if isinstance(layer, RemoteCacheLayer):
            _require_ours(layer, transport)
            return layer.session
        _require_unused(layer)
    remote = RemoteCacheLayer(transport, opening())
    with_session(cache, trunk, remote)
    return remote.session


def held_session(cache: Cache, trunk: range, transport: Transport) -> ClientSession:
    """The session of a cache that holds a text.

    Raises:
        UnsupportedCall: it holds none, or another model's.
    """
    layer = cache.layers[trunk.start] if len(cache.layers) > trunk.start else None
    if not isinstance(layer, RemoteCacheLayer) or not layer.session.is_open or not layer.session.length:
        raise UnsupportedCall(
            "this cache holds no text of a split model: give the past_key_values that generate() returned "
            "with return_dict_in_generate=True, or that a forward has filled"
        )
    _require_ours(layer, transport)
    return layer.session


def with_session(cache: AnyCache, trunk: range, remote: RemoteCacheLayer) -> AnyCache:
    """The cache, with this session in the trunk's place."""
    cache.layers[trunk.start : trunk.stop] = [remote, *(InertLayer(remote) for _ in trunk[1:])]
    return cache


def _require_ours(layer: RemoteCacheLayer, transport: Transport) -> None:
    if layer._transport is not transport:
        raise UnsupportedCall("past_key_values belongs to another split model: each model needs its own")


def _require_unused(layer: Any) -> None:
    if layer.get_seq_length() > 0:
        raise UnsupportedCall(
            "past_key_values was filled by a whole model, the trunk does not have its keys and values: "
            "run the prompt through this model"
        )
