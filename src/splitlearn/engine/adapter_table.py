"""Adapters that a generation session can name: those that were loaded, and those of the runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from splitlearn.engine.trunk_state import AdapterVersion, TrunkState
from splitlearn.errors import AdapterError, MessageError, ResourceExhausted
from splitlearn.model import lora
from splitlearn.vocabulary import LoraSettings
from splitlearn.wire.messages import AdapterMessage


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter that nobody trains here."""

    lora: LoraSettings
    version: AdapterVersion


class AdapterTable:
    """Belongs to the engine's thread."""

    def __init__(self, state: TrunkState, max_adapters: int) -> None:
        self._state = state
        self._max_adapters = max_adapters
        self._loaded: dict[str, LoadedAdapter] = {}

    def __len__(self) -> int:
        return len(self._loaded)

    def load(self, message: AdapterMessage) -> LoadedAdapter:
        """Put an adapter's weights beside the trunk.

        Raises:
            MessageError: the name is taken; ResourceExhausted: there are enough adapters.
            AdapterError: the weights are not those that the settings make in this trunk.
        """
        if message.name in self._loaded:
            raise MessageError(f"adapter {message.name!r} is loaded already: unload it, or take another name")
        if len(self._loaded) >= self._max_adapters:
            raise ResourceExhausted(
                f"{len(self._loaded)} adapters are loaded, this server allows {self._max_adapters}: "
                "unload one",
                facts={"adapters": len(self._loaded), "max_adapters": self._max_adapters},
            )
        lora.check(message.lora)
        slot = self._state.new_slot()
        expected = self._state.slots.add(slot, message.lora, seed=0)
        try:
            weights = fitting(message.weights, expected)
        except AdapterError:
            self._state.slots.remove(slot)
            raise
        loaded = LoadedAdapter(message.lora, AdapterVersion(message.name, slot, 1, weights))
        self._loaded[message.name] = loaded
        return loaded

    def find(self, name: str) -> LoadedAdapter | None:
        return self._loaded.get(name)

    def unload(self, name: str) -> int:
        """The bytes that this frees; sessions that generate with the adapter end at their next step.

        Raises:
            AdapterError: it is not loaded.
        """
        loaded = self._loaded.pop(name, None)
        if loaded is None:
            raise AdapterError(f"no adapter {name!r} is loaded on this server")
        assert loaded.version.slot is not None
        self._state.slots.remove(loaded.version.slot)
        return sum(weight.nbytes for weight in loaded.version.weights.values())


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
