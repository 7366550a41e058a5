import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import Phi3ForCausalLM

from splitlearn.model.plan import SplitPlan
from splitlearn.model.rotary import guard_recomputed_rotary
from splitlearn.model.segments import client_class
from splitlearn.testing.tiny import tiny_config

MEET_S = 0.3


class TellingRotary(nn.Module):
    """Writes its frequency, waits for the other thread to have done so too, and reads it."""

    def __init__(self, rope_type: str | dict[str, str]) -> None:
        super().__init__()
        self.rope_type = rope_type
        self.both_wrote = threading.Barrier(2)
        self.frequency = 0

    def forward(self, length: int) -> int:
        self.frequency = length
        try:
            self.both_wrote.wait(MEET_S)
        except threading.BrokenBarrierError:
            self.both_wrote.reset()
        return self.frequency


class Decoder(nn.Module):
    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity()])
        self.rotary_emb = rotary


def answers(decoder: Decoder) -> list[int]:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(decoder.rotary_emb, [7, 70]))


@pytest.mark.parametrize(
    "rope_type", ["longrope", {"full_attention": "longrope", "sliding_attention": "default"}]
)
def test_threads_do_not_rotate_by_each_others_frequencies(rope_type: str | dict[str, str]) -> None:
    decoder = Decoder(TellingRotary(rope_type))
    guard_recomputed_rotary(decoder)
    assert answers(decoder) == [7, 70]


def test_without_the_guard_they_would() -> None:
    assert answers(Decoder(TellingRotary("longrope"))) != [7, 70]


def test_tables_that_never_change_are_left_as_they_are() -> None:
    decoder = Decoder(TellingRotary("default"))
    guard_recomputed_rotary(decoder)
    assert "forward" not in vars(decoder.rotary_emb)


@pytest.mark.parametrize(("family", "guarded"), [("phi3(longrope)", True), ("phi3", False)])
def test_a_clients_model_is_guarded_where_it_needs_it(family: str, guarded: bool) -> None:
    config = tiny_config(family)
    with torch.device("meta"):
        model = client_class(Phi3ForCausalLM, SplitPlan.for_config(config), nn.Identity)(config)
    assert ("forward" in vars(model.model.rotary_emb)) is guarded
