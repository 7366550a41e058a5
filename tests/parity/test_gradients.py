"""Gradients of every LoRA weight over a real server, against autograd of the whole model."""

import copy
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from splitlearn import AutoSplitModelForCausalLM
from splitlearn.testing.gradients import adapted, furthest, gradients_of_split, gradients_of_whole
from splitlearn.testing.pair import Pair

CLOSE = 1e-5
IDS = torch.randint(4, 128, (2, 12), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS)
PADDED[1, 8:] = 0


@pytest.fixture(scope="module")
def trained(pair: Pair) -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    """Whole and split with one adapter; both evaluate, so that nothing is dropped at random."""
    whole = copy.deepcopy(pair.whole)
    split = AutoSplitModelForCausalLM.from_pretrained(pair.whole.name_or_path, trunk=pair.server.address)
    adapted(whole, split, pair.engine, LoraConfig(r=4, target_modules="all-linear"))
    yield whole, split
    split.close()


def loss(model: PreTrainedModel, mask: Tensor | None) -> Tensor:
    labels = IDS if mask is None else IDS.masked_fill(mask == 0, -100)
    return model(IDS, attention_mask=mask, labels=labels, use_cache=False).loss


@pytest.mark.parametrize("mask", [None, PADDED], ids=["full", "padded"])
def test_gradients_of_all_lora_weights_are_those_of_the_whole_model(
    pair: Pair, trained: tuple[PreTrainedModel, PreTrainedModel], mask: Tensor | None
) -> None:
    whole, split = trained
    for model in trained:
        model.zero_grad()
    losses = [loss(model, mask) for model in trained]
    for each in losses:
        each.backward()
    ours, theirs = gradients_of_split(split, pair.engine), gradients_of_whole(whole)
    split.trunk.skip_step()
    assert torch.equal(*losses)
    assert any(gradient.abs().max() > 0 for gradient in theirs.values())
    assert furthest(ours, theirs) <= CLOSE
