"""Tiny model folders, each made once, and a trunk that answers in this process."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.model.weights import load_trunk
from splitlearn.testing.tiny import tiny_model, tiny_whole


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a family's tiny model; the same one for the same request."""
    made: dict[Any, Path] = {}

    def folder(family: str, seed: int = 0) -> Path:
        if (family, seed) not in made:
            made[family, seed] = tiny_model(family, tmp_path_factory.mktemp("model"), seed)
        return made[family, seed]

    return folder


@dataclass(frozen=True)
class Loaded:
    """A family's model, whole and trunk; only read by tests."""

    folder: Path
    checkpoint: Checkpoint
    whole: PreTrainedModel
    trunk: TrunkSegment


@pytest.fixture(scope="session")
def loaded_of(folder_of: Callable[..., Path]) -> Callable[[str], Loaded]:
    @cache
    def loaded(family: str) -> Loaded:
        # Tests ask for it within inference mode, whose tensors no other test could differentiate.
        with torch.inference_mode(False):
            folder = folder_of(family)
            checkpoint = Checkpoint.open(folder)
            plan = SplitPlan.for_config(checkpoint.config)
            return Loaded(folder, checkpoint, tiny_whole(folder), load_trunk(checkpoint, plan))

    return loaded


class InProcessTrunk(nn.Module):
    """What stands for the client's RemoteTrunk: asks the segment, with what a server would be told."""

    def __init__(self, segment: TrunkSegment) -> None:
        super().__init__()
        self.__dict__["segment"] = segment
        self.told: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **asked: Any) -> Tensor:
        return self.segment(hidden_states, **self.told)


@pytest.fixture(scope="session")
def in_process() -> type[InProcessTrunk]:
    return InProcessTrunk


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def left_padded() -> Tensor:
    """The second row begins with four tokens that do not count."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    return mask
