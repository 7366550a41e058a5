import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from splitlearn.model.stand_in import AnswerForm, PassedLayer, RemoteLayer

HIDDEN = torch.ones(1, 2, 4)


class Layer(nn.Module):
    """A family's layer, which takes some of its arguments by position."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_type = "sliding_attention"
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, hidden_states: Tensor, layer_past: Any, attention_mask: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class Remote(nn.Module):
    def forward(self, hidden_states: Tensor, **asked: Any) -> Tensor:
        self.asked = asked
        return hidden_states + 1


def test_the_remote_gets_by_name_what_the_family_passes_by_position():
    remote = Remote()
    layer = RemoteLayer(Layer(), AnswerForm(), remote)
    answer = layer(HIDDEN, "cache", "mask", position_ids="positions")
    assert torch.equal(answer, HIDDEN + 1)
    assert remote.asked == {
        "past_key_values": "cache",
        "attention_mask": "mask",
        "position_ids": "positions",
    }


def test_everything_by_name_works_too():
    layer = PassedLayer(Layer(), AnswerForm())
    assert layer(hidden_states=HIDDEN, layer_past=None) is HIDDEN


@pytest.mark.parametrize("is_tuple", [True, False])
def test_the_answer_has_the_form_that_the_layer_below_gave(is_tuple: bool):
    form = AnswerForm()
    below = nn.Identity()
    below.register_forward_hook(form.learn)
    below((HIDDEN, None) if is_tuple else HIDDEN)
    answer = PassedLayer(Layer(), form)(HIDDEN)
    assert isinstance(answer, tuple) == is_tuple
    assert (answer[0] if is_tuple else answer) is HIDDEN


def test_a_copied_model_learns_for_itself():
    form = AnswerForm()
    below = nn.Identity()
    below.register_forward_hook(form.learn)
    copied = copy.deepcopy(nn.ModuleList([below, PassedLayer(Layer(), form)]))
    copied[0]((HIDDEN,))
    assert copied[1].form.is_tuple
    assert not form.is_tuple


def test_plain_attributes_of_the_replaced_layer_stay_and_its_weights_go():
    layer = PassedLayer(Layer(), AnswerForm())
    assert layer.attention_type == "sliding_attention"
    assert not list(layer.parameters())
