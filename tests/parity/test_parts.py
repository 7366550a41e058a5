"""In every family: which modules are bottom's and top's, and that PEFT's file holds all of them."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from splitlearn import AutoSplitModelForCausalLM
from splitlearn.client.parts import parts_of, units_of
from splitlearn.client.training import prepare_training
from splitlearn.testing.pair import Pair

IDS = torch.randint(4, 128, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def split(pair: Pair) -> Iterator[PreTrainedModel]:
    split = AutoSplitModelForCausalLM.from_pretrained(pair.whole.name_or_path, trunk=pair.server.address)
    yield split
    split.close()


def test_bottom_is_what_the_activation_at_the_lower_cut_is_made_of(split: PreTrainedModel) -> None:
    sent: list[Tensor] = []
    split.trunk.register_forward_pre_hook(
        lambda _, args, kwargs: sent.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    split(IDS, use_cache=False)
    weights = list(split.parameters())
    gradients = torch.autograd.grad(sent[0].sum(), weights, allow_unused=True)
    used = {id(weight) for weight, each in zip(weights, gradients, strict=True) if each is not None}
    assert used == {id(weight) for part, weight in parts_of(split, split.trunk) if part == "bottom"}
    assert {part for part, _ in parts_of(split, split.trunk)} == {"bottom", "top"}
    named = [weight for _, _, unit in units_of(split, split.trunk) for weight in unit.parameters()]
    assert {id(weight) for weight in named} == set(map(id, weights))


@pytest.mark.filterwarnings("ignore:.*tie")
def test_peft_loads_bottom_and_top_as_they_were_trained(
    pair: Pair, split: PreTrainedModel, tmp_path: Path
) -> None:
    prepare_training(split, lora=None, run=None, freeze=["trunk"], seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in split.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
        split.save_adapter(tmp_path)
        expected = split.eval()(IDS, use_cache=False).logits
        whole = PeftModel.from_pretrained(copy.deepcopy(pair.whole), tmp_path).eval()
        assert torch.allclose(whole(IDS, use_cache=False).logits, expected, atol=1e-5)
    assert not torch.allclose(pair.whole(IDS, use_cache=False).logits, expected, atol=1e-3)
