"""Which adapters may stand side by side in one batch, and which place each has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import structlog
import torch
from torch import Tensor

from splitlearn.engine.trunk_state import AdapterVersion
from splitlearn.errors import first_line
from splitlearn.model.lora import LoraSlots
from splitlearn.model.lora_bank import BARE_PLACE, LoraBank, PlainLora
from splitlearn.model.static_layer import bucket

# R rows

log = structlog.get_logger("splitlearn.engine")
FEWEST_PLACES = 4
Adapter = Mapping[str, PlainLora]


@dataclass(frozen=True)
class BankShape:
    """Places, and each layer's rank, in powers of two."""

    places: int = FEWEST_PLACES
    layers: Mapping[str, PlainLora] = field(default_factory=dict)

    @classmethod
    def of(cls, adapters: Collection[Adapter]) -> BankShape:
        shape = cls(bucket(len(adapters) + 1, FEWEST_PLACES))
        for adapter in adapters:
            layers = {
                name: replace(each, rank=bucket(each.rank), scale=1.0) for name, each in adapter.items()
            }
            shape |= cls(layers=layers)
        return shape

    def __or__(self, other: BankShape) -> BankShape:
        """Large enough for both."""
        layers = dict(self.layers)
        for name, layer in other.layers.items():
            layers[name] = max(layer, layers.get(name, layer), key=lambda each: each.rank)
        return BankShape(max(self.places, other.places), layers)

    def holds(self, adapters: int, newest: Adapter) -> bool:
        """Whether there is room for so many adapters, this one among them."""
        ranks_fit = (
            name in self.layers and each.rank <= self.layers[name].rank for name, each in newest.items()
        )
        return adapters < self.places and all(ranks_fit)

    @property
    def bytes(self) -> int:
        return self.places * sum(layer.rank * layer.rank_bytes for layer in self.layers.values())


class AdapterBank:
    """Belongs to the engine's thread.

    A version has a place from the first step of a session that generates with it until no session holds it.
    Memory is taken when a batch needs the bank; it grows in powers of two within its budget, and does not
    shrink by itself. Adapters without a place, those that are more than plain LoRA among them, run in
    batches of their own.
    """

    def __init__(self, slots: LoraSlots, budget_bytes: int) -> None:
        self._slots = slots
        self._budget_bytes = budget_bytes
        self._shape = BankShape()
        self._bank: LoraBank | None = None
        self._places: dict[AdapterVersion, int] = {}
        self._adapters: dict[AdapterVersion, Adapter] = {}
        self._filled: set[AdapterVersion] = set()
        self._refused: set[AdapterVersion] = set()
        self.generation = 1
        """Changes with the bank's memory: what was recorded over an older one is void."""

    @property
    def bytes(self) -> int:
        """What is allocated."""
        return 0 if self._bank is None else self._bank.bytes

    def admit(self, version: AdapterVersion) -> None:
        """Give a version a place, if there can be one for it; one that has its place keeps it."""
        if version.slot is None or version in self._places or version in self._refused:
            return
        adapter = self._slots.plain(version.slot)
        if adapter is None or (shape := self._with_room_for(adapter)) is None:
            self._refused.add(version)
            return
        self._adapters[version] = adapter
        if shape == self._shape:
            taken = {BARE_PLACE, *self._places.values()}
            self._places[version] = min(set(range(shape.places)) - taken)
        else:
            self._reshape(shape)

    def mixes(self, version: AdapterVersion) -> bool:
        """Whether its rows may stand beside those of other adapters."""
        # One that was unloaded is refused where it is bound alone.
        return version.slot is None or (version in self._places and version.slot in self._slots)

    def places(self, versions: Sequence[AdapterVersion], *, even_one: bool) -> tuple[int, ...]:
        """The place of each, its weights in it; nothing where all are one adapter that has none.

        `even_one` asks for the place of one adapter that could be bound alone, too.

        Raises:
            RuntimeError: there is no memory for several adapters side by side; none mixes from then on.
        """
        adapters = set(versions)
        is_one = len(adapters) == 1
        if all(version.slot is None for version in adapters):
            return (BARE_PLACE,) * len(versions)
        if is_one and not even_one:
            return ()
        if all(map(self.mixes, adapters)) and self._fill():
            return tuple(self._places.get(version, BARE_PLACE) for version in versions)
        if is_one:
            return ()
        raise RuntimeError("these adapters cannot run side by side: there is no memory for their copies")

    def keep(self, versions: Iterable[AdapterVersion]) -> None:
        """Free the places of all others: no session holds them any more."""
        if not self._places and not self._refused:
            return
        held = set(versions)
        gone = self._places.keys() - held
        for version in gone:
            del self._places[version], self._adapters[version]
        self._filled -= gone
        # Where a place has become free, those that found none may try again.
        self._refused = set() if gone else self._refused & held

    def bound(self, place_R: Tensor) -> AbstractContextManager[None]:
        """Within it rows compute with the adapters of these places, which lie on the device."""
        assert self._bank is not None, "only rows with a place are bound"
        return self._bank.bound(place_R)

    @torch.inference_mode()
    def _fill(self) -> bool:
        """Write the weights of all that have a place; where there is no memory, none has one from then on."""
        try:
            if self._bank is None:
                self._bank = LoraBank(self._shape.layers, self._shape.places)
                log.info("adapter bank", places=self._shape.places, bytes=self._bank.bytes)
            for version in self._places.keys() - self._filled:
                self._bank.put(self._places[version], self._adapters[version], version.weights)
                self._filled.add(version)
        except RuntimeError as error:
            log.warning("adapters run in batches of their own", error=first_line(error))
            self._budget_bytes = 0
            self._adapters.clear()
            self._reshape(BankShape())
            return False
        return True

    def _with_room_for(self, adapter: Adapter) -> BankShape | None:
        """As large as it was, or larger; else just as large as is needed now; None is beyond the budget."""
        if self._shape.holds(len(self._adapters) + 1, adapter):
            return self._shape
        wanted = BankShape.of([*self._adapters.values(), adapter])
        fitting = (shape for shape in (self._shape | wanted, wanted) if shape.bytes <= self._budget_bytes)
        return next(fitting, None)

    def _reshape(self, shape: BankShape) -> None:
        """Let the old memory go before there is a new one."""
        self._shape, self._bank = shape, None
        self._places = {version: place for place, version in enumerate(self._adapters, 1)}
        self._filled.clear()
        self.generation += 1
