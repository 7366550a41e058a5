"""Where a model is cut: which layers are bottom, trunk and top."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from splitlearn.errors import SplitPlanError


class LayeredConfig(Protocol):
    """All that a plan wants to know of a model."""

    num_hidden_layers: int


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Layers [0, k) are bottom, [k, n - m) trunk, [n - m, n) top."""

    num_layers: int
    bottom_layers: int
    top_layers: int
    accept_label_leak: bool = False

    def __post_init__(self) -> None:
        if self.bottom_layers < 1:
            raise SplitPlanError(
                f"{self.bottom_layers} bottom layers would send embeddings, which are tokens in "
                "another spelling; take at least 1"
            )
        if self.top_layers < 0:
            raise SplitPlanError(f"{self.top_layers} top layers: take 0 or more")
        if self.top_layers == 0 and not self.accept_label_leak:
            raise SplitPlanError(
                "with 0 top layers the returned gradient gives the labels away; "
                "take at least 1, or accept it with accept_label_leak"
            )
        if not self.trunk:
            raise SplitPlanError(
                f"{self.bottom_layers} bottom and {self.top_layers} top layers "
                f"leave no trunk in a model of {self.num_layers}; lower one of them"
            )

    @classmethod
    def for_config(
        cls,
        config: LayeredConfig,
        bottom_layers: int = 2,
        top_layers: int = 2,
        accept_label_leak: bool = False,
    ) -> SplitPlan:
        """The plan for the model that this configuration describes."""
        return cls(config.num_hidden_layers, bottom_layers, top_layers, accept_label_leak)

    @property
    def bottom(self) -> range:
        return range(self.bottom_layers)

    @property
    def trunk(self) -> range:
        return range(self.bottom_layers, self.num_layers - self.top_layers)

    @property
    def top(self) -> range:
        return range(self.num_layers - self.top_layers, self.num_layers)

    def __str__(self) -> str:
        return f"{self.bottom_layers}/{len(self.trunk)}/{self.top_layers}"
