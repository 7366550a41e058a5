"""What the trunk's modules are set to: an adapter at one version, train or eval, what is recomputed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor

from splitlearn.engine.compiled_layers import CompiledLayers
from splitlearn.errors import SettingError
from splitlearn.model.lora import LoraSlots
from splitlearn.model.segments import TrunkSegment
from splitlearn.vocabulary import AUTOCASTS, Precision
from splitlearn.wire.dtypes import dtype_name


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AdapterVersion:
    """An adapter's weights as one optimizer step left them; never changed, only replaced by the next."""

    name: str = ""
    slot: str | None = None
    number: int = 0
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    ends: Mapping[str, Tensor] = field(default_factory=dict)
    """Of bottom and top, where the run trains them with the trunk."""


BARE = AdapterVersion()
"""The base model without any adapter."""


class TrunkState:
    """Set before each forward; what is set already costs nothing."""

    def __init__(self, trunk: TrunkSegment, *, compiled: bool = False) -> None:
        self.compiled = CompiledLayers(trunk.layers)
        self._compile_training = compiled
        self.slots = LoraSlots(trunk.causal_lm)
        self._trunk = trunk
        self._training = trunk.training
        self._checkpoint_every = 0
        self._numbers = count(1)

    def new_slot(self) -> str:
        """A name for an adapter's place in the layers; never one that was there before."""
        return f"slot{next(self._numbers)}"

    def set(self, adapter: AdapterVersion, *, training: bool = False, checkpoint_every: int = 0) -> None:
        """Compute with this adapter; `training` turns dropout on, every n-th layer is recomputed then."""
        self.slots.bind(adapter.slot, adapter.weights)
        if training != self._training:
            self._trunk.train(training)
            self._training = training
        if training and checkpoint_every != self._checkpoint_every:
            self._checkpoint(checkpoint_every)
            self._checkpoint_every = checkpoint_every
        self.compiled.use(training and self._compile_training)

    def require_precision(self, wanted: Precision) -> None:
        """Raises SettingError where the trunk's weights are of another dtype, or autocast knows no such."""
        held = dtype_name(self._trunk.dtype)
        if wanted.weights not in ("", held):
            raise SettingError(f"weights in {wanted.weights} are wanted, this trunk holds {held}")
        if wanted.autocast not in ("", *AUTOCASTS):
            raise SettingError(
                f"autocast to {wanted.autocast} is wanted: it is {' or '.join(AUTOCASTS)}, or left out"
            )

    def require_checkpointing(self) -> None:
        """Raises SettingError where this family cannot recompute a layer."""
        if not self._trunk.causal_lm.supports_gradient_checkpointing:
            raise SettingError(
                f"{self._trunk.config.model_type} cannot recompute single layers: leave checkpoint_every out"
            )

    def _checkpoint(self, every: int) -> None:
        if every:
            self._trunk.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        for index, layer in enumerate(self._trunk.layers):
            layer.gradient_checkpointing = bool(every) and index % every == 0  # type: ignore[assignment]
