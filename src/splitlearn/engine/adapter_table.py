"""Adapters that clients have loaded, each for itself: sessions can name them, and runs begin with them."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from splitlearn.engine.account import Account, Accounts
from splitlearn.engine.trunk_state import AdapterVersion, TrunkState
from splitlearn.errors import AdapterError, MessageError, ResourceExhausted
from splitlearn.model import lora
from splitlearn.vocabulary import LoraSettings
from splitlearn.wire.messages import AdapterMessage


@dataclass(slots=True)
class LoadedAdapter:
    """An adapter that nobody trains here."""

    lora: LoraSettings
    version: AdapterVersion
    account: Account
    used_at: float

    @property
    def held_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.version.weights.values())


class AdapterTable:
    """Belongs to the engine's thread. A name is its client's own: two clients may use the same."""

    def __init__(
        self,
        state: TrunkState,
        max_adapters: int,
        accounts: Accounts | None = None,
        *,
        lease_s: float = math.inf,
    ) -> None:
        self._state = state
        self._max_adapters = max_adapters
        self._lease_s = lease_s
        self._accounts = accounts or Accounts()
        self._loaded: dict[tuple[bytes, str], LoadedAdapter] = {}

    def __len__(self) -> int:
        return len(self._loaded)

    def load(self, client: bytes, message: AdapterMessage) -> LoadedAdapter:
        """Put an adapter's weights beside the trunk, for this client alone.

        Raises:
            MessageError: the client has one of this name; ResourceExhausted: there are enough adapters, or
                this one is more than the client's quota allows.
            AdapterError: the weights are not those that the settings make in this trunk.
        """
        if (client, message.name) in self._loaded:
            raise MessageError(f"adapter {message.name!r} is loaded already: unload it, or take another name")
        if len(self._loaded) >= self._max_adapters:
            raise ResourceExhausted(
                f"{len(self._loaded)} adapters are loaded, this server allows {self._max_adapters}: "
                "unload one",
                facts={"adapters": len(self._loaded), "max_adapters": self._max_adapters},
            )
        lora.check(message.lora)
        account = self._accounts.of(client)
        slot = self._state.new_slot()
        expected = self._state.slots.add(slot, message.lora, seed=0)
        try:
            version = AdapterVersion(message.name, slot, 1, fitting(message.weights, expected))
            loaded = LoadedAdapter(message.lora, version, account, time.monotonic())
            account.take(loaded.held_bytes, f"adapter {message.name}")
        except (AdapterError, ResourceExhausted):
            self._state.slots.remove(slot)
            raise
        self._loaded[client, message.name] = loaded
        return loaded

    def find(self, client: bytes, name: str) -> LoadedAdapter | None:
        """Whatever others have loaded under this name."""
        if (loaded := self._loaded.get((client, name))) is not None:
            loaded.used_at = time.monotonic()
        return loaded

    def unload(self, client: bytes, name: str) -> int:
        """The bytes that this frees; sessions that generate with the adapter end at their next step.

        Raises:
            AdapterError: this client has not loaded it.
        """
        loaded = self._loaded.pop((client, name), None)
        if loaded is None:
            raise AdapterError(f"no adapter {name!r} is loaded on this server")
        assert loaded.version.slot is not None
        self._state.slots.remove(loaded.version.slot)
        loaded.account.give_back(loaded.held_bytes)
        return loaded.held_bytes

    def expire(self, now: float, held: Collection[AdapterVersion]) -> list[str]:
        """Unload those that nobody has named for the lease and no session holds; their names.

        A client that is gone for good would leave its own here, where nobody else can unload them.
        """
        idle = [
            key
            for key, loaded in self._loaded.items()
            if loaded.used_at + self._lease_s < now and loaded.version not in held
        ]
        for client, name in idle:
            self.unload(client, name)
        return [name for _, name in idle]


def fitting(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in the trunk's order, in float32 on its device.

    Raises:
        AdapterError: names or shapes are others than the trunk's.
    """
    if missing := expected.keys() - weights.keys():
        raise AdapterError(f"the adapter lacks {len(missing)} of the trunk's weights, first {min(missing)}")
    if surplus := weights.keys() - expected.keys():
        raise AdapterError(
            f"the adapter has {len(surplus)} weights that the trunk lacks, first {min(surplus)}"
        )
    for name, weight in expected.items():
        if weights[name].shape != weight.shape:
            raise AdapterError(
                f"{name} has shape {list(weights[name].shape)}, the trunk needs {list(weight.shape)}"
            )
    return {
        name: weights[name].to(weight.device, torch.float32, copy=True) for name, weight in expected.items()
    }
