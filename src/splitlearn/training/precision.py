"""What matrix products run in where nobody says: the best that both sides' devices have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from splitlearn.client.calls import describe
from splitlearn.config import ClientConfig
from splitlearn.model import devices
from splitlearn.wire.handshake import NATIVE_BFLOAT16


@dataclass(frozen=True, slots=True)
class Side:
    """What one side of the cut computes with; dtypes by their names."""

    device: str
    weights: str
    has_bfloat16: bool

    @property
    def takes_bfloat16(self) -> bool:
        """Products with weights in bfloat16 are in it in any case."""
        return self.has_bfloat16 or self.weights == "bfloat16"

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def __str__(self) -> str:
        has = "has" if self.has_bfloat16 else "has no"
        return f"{self.weights} weights on {self.device}, which {has} bfloat16"


def auto_precision(here: Side, trunk: Side) -> str:
    """bfloat16 where both sides take it, else float16 where both are CUDA devices, else float32.

    Both, because a run has one precision, and the slower side sets the pace. float16 needs its loss scaled,
    which is there on CUDA alone.
    """
    if here.takes_bfloat16 and trunk.takes_bfloat16:
        return "bfloat16"
    return "float16" if here.is_cuda and trunk.is_cuda else "float32"


def sides_of(model: Any) -> tuple[Side, Side]:
    """Of a split model: the client's, and the trunk's as its server describes it.

    Raises:
        TrunkUnreachable, NotATrunk: nobody answers there, or somebody else does.
    """
    facts = describe(model.trunk.transport.address, ClientConfig().connect_s)
    weights = str(model.dtype).removeprefix("torch.")
    return (
        Side(str(model.device), weights, devices.has_bfloat16(model.device)),
        Side(facts.device, facts.precision.weights, NATIVE_BFLOAT16 in facts.features),
    )
