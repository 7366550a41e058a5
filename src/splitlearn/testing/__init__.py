"""What tests stand on, ours and our users': tiny models, a split model beside its whole one, no network."""

from splitlearn.testing.loopback import LoopbackTransport, split_over_loopback
from splitlearn.testing.pair import Pair, lively_model, served_pair
from splitlearn.testing.tiny import tiny_config, tiny_model, tiny_whole

__all__ = [
    "LoopbackTransport",
    "Pair",
    "lively_model",
    "served_pair",
    "split_over_loopback",
    "tiny_config",
    "tiny_model",
    "tiny_whole",
]
