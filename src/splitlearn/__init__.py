"""Split a causal LM between the owner of the data and the owner of the GPU."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitlearn.client.split_model import AutoSplitModelForCausalLM
    from splitlearn.server.trunk_server import TrunkServer
    from splitlearn.training.evaluation import TokenWeightedEvaluation, held_out_loss
    from splitlearn.training.trainer import SplitTrainer, SplitTrainerMixin
    from splitlearn.vocabulary import CohortSettings, ShareSettings

__version__ = "0.1.0"
__all__ = [
    "AutoSplitModelForCausalLM",
    "CohortSettings",
    "ShareSettings",
    "SplitTrainer",
    "SplitTrainerMixin",
    "TokenWeightedEvaluation",
    "TrunkServer",
    "__version__",
    "held_out_loss",
]

# Loaded when first asked for, so that `import splitlearn` and `splitlearn --help` need no torch.
_HOMES = {
    "AutoSplitModelForCausalLM": "splitlearn.client.split_model",
    "CohortSettings": "splitlearn.vocabulary",
    "ShareSettings": "splitlearn.vocabulary",
    "SplitTrainer": "splitlearn.training.trainer",
    "SplitTrainerMixin": "splitlearn.training.trainer",
    "TokenWeightedEvaluation": "splitlearn.training.evaluation",
    "TrunkServer": "splitlearn.server.trunk_server",
    "held_out_loss": "splitlearn.training.evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
