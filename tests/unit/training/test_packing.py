"""Packed examples are learned exactly as they are alone: in the whole model and over the wire."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from splitlearn.client.training import prepare_training
from splitlearn.errors import DataError, SettingError
from splitlearn.testing.loopback import split_over_loopback
from splitlearn.testing.tiny import PROVEN, VARIANTS, tiny_config, tiny_model, tiny_whole
from splitlearn.training.batches import PaddedBatch, packed_batch
from splitlearn.training.packing import pack, require_packable
from splitlearn.training.tokens import IGNORED, Tokenized, learned

CLOSE = 1e-5
MAX_TOKENS, PAD = 24, 0
LENGTHS = [13, 2, 11, 5, 17, 4]  # rows of 13 + 11, which is full, and of 17 + 5 + 2, and one with a tail
FAMILIES = ["llama", "gpt2", "gemma3_text"]
NOT_PACKABLE = {"bloom", "mpt", "falcon", "falcon(alibi)", "gpt_oss", "opt", "phi3(longrope)"}


def example(length: int, prompt: int = 1, seed: int = 0) -> Tokenized:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 128, (length,), generator=generator).tolist()
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


EXAMPLES = [example(length, prompt=1 + n % 3 // 2, seed=n) for n, length in enumerate(LENGTHS)]
padded_batch = PaddedBatch(PAD)


def packed(examples: list[Tokenized] = EXAMPLES) -> dict[str, Any]:
    return packed_batch(pack(examples, MAX_TOKENS, PAD))


def summed_loss(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    return model(**({"use_cache": False} | batch), num_items_in_batch=1).loss


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp_min(1e-9))


def learn(model: PreTrainedModel, *batches: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The batches' summed loss, and its gradient of every weight that has one."""
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = summed_loss(model, batch)
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses).sum(), gradients


def furthest(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> float:
    """The largest relative distance, of the loss and of each weight's gradient over its largest."""
    assert ours[1].keys() == theirs[1].keys()
    return max(
        distance(ours[0], theirs[0]), *(distance(ours[1][name], theirs[1][name]) for name in theirs[1])
    )


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return lambda family: tiny_model(family, tmp_path_factory.mktemp(family.partition("(")[0]))


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request, folder_of) -> PreTrainedModel:
    return tiny_whole(folder_of(request.param))


def test_the_examples_try_full_rows_and_tails_and_several_a_row():
    rows = pack(EXAMPLES, MAX_TOKENS, PAD)
    assert [row["position_ids"].count(0) for row in rows] == [2, 3, 2]
    assert rows[0]["position_ids"] == [*range(13), *range(11)]
    assert rows[2]["position_ids"] == [*range(4), *range(MAX_TOKENS - 4)]
    assert rows[2]["labels"][4:] == [IGNORED] * (MAX_TOKENS - 4)


def test_packed_is_learned_as_unpacked(whole):
    """All examples alone, all in one padded batch, and all packed: the same loss, the same gradients."""
    alone = learn(whole, *(padded_batch([each]) for each in EXAMPLES))
    assert furthest(learn(whole, padded_batch(EXAMPLES)), alone) <= CLOSE
    assert furthest(learn(whole, packed()), alone) <= CLOSE


def positions_that_go_on(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | {"position_ids": torch.arange(MAX_TOKENS).expand_as(batch["input_ids"])}


def a_mask_of_ones(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def first_tokens_learned(batch: dict[str, Any]) -> dict[str, Any]:
    is_first = batch["position_ids"] == 0
    return batch | {"labels": torch.where(is_first, batch["input_ids"], batch["labels"])}


def a_cache(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | {"use_cache": True}


@pytest.mark.parametrize("spoil", [positions_that_go_on, a_mask_of_ones, first_tokens_learned, a_cache])
def test_so_it_would_not_be_with(whole, spoil):
    """Each thing that a packed batch has, or has not, is needed."""
    alone = learn(whole, *(padded_batch([each]) for each in EXAMPLES))
    assert furthest(learn(whole, spoil(packed())), alone) > 1e3 * CLOSE


def test_the_padding_of_a_row_changes_nothing(whole):
    batch = packed()
    is_tail = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    is_tail[2, 4:] = True
    other = batch | {"input_ids": batch["input_ids"].masked_fill(is_tail, 99)}
    gradients = learn(whole, other)
    assert furthest(gradients, learn(whole, batch)) <= CLOSE


@pytest.mark.parametrize("family", [*PROVEN, *VARIANTS])
def test_a_family_is_refused_if_and_only_if_its_examples_would_see_each_other(folder_of, family):
    model = tiny_whole(folder_of(family))
    with torch.inference_mode():
        alone = sum(summed_loss(model, padded_batch([each])) for each in EXAMPLES)
        together = summed_loss(model, packed())
    is_equal = distance(together, alone) <= 1e-6
    assert is_equal == (family not in NOT_PACKABLE)
    if is_equal:
        require_packable(model.config)
    else:
        with pytest.raises(SettingError, match=r"cannot learn from packed examples .*without packing"):
            require_packable(model.config)


def test_a_family_that_nobody_has_tried_is_refused():
    with pytest.raises(SettingError, match="not in the table"):
        require_packable(tiny_config("olmo"))


@pytest.fixture(scope="module", params=FAMILIES)
def split_and_whole(request, folder_of):
    folder = folder_of(request.param)
    with split_over_loopback(folder) as split:
        prepare_training(split, LoraConfig(r=4, target_modules="all-linear"), None, (), 0)
        yield split.eval(), tiny_whole(folder)


def learn_split(split: PreTrainedModel, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """As `learn`, with the norms of the trunk's gradients among the gradients."""
    loss, gradients = learn(split, batch)
    norms = split.trunk.grad_norms()
    split.trunk.skip_step()
    assert norms.max() > 0
    return loss, gradients | {"trunk": norms}


def test_over_the_wire_a_packed_loss_is_the_whole_models(split_and_whole):
    split, whole = split_and_whole
    theirs = summed_loss(whole, packed())
    with torch.no_grad():
        evaluated = summed_loss(split, packed())
    trained, _ = learn_split(split, packed())
    assert distance(evaluated, theirs) <= CLOSE
    assert distance(trained, theirs) <= CLOSE


def test_over_the_wire_packed_is_learned_as_unpacked(split_and_whole):
    split, _ = split_and_whole
    alone = learn_split(split, padded_batch(EXAMPLES))
    assert furthest(learn_split(split, packed()), alone) <= CLOSE
    assert furthest(learn_split(split, positions_that_go_on(packed())), alone) > 1e3 * CLOSE


def test_the_trunk_is_told_where_each_example_begins(split_and_whole, monkeypatch):
    split, whole = split_and_whole
    heard, transport = [], split.trunk.transport
    tell = transport.run_step

    def overhear(message, forget_positions=False):
        heard.append(message)
        return tell(replace(message, positions_BT=None) if forget_positions else message)

    monkeypatch.setattr(transport, "run_step", overhear)
    with torch.no_grad():
        told = summed_loss(split, packed())
        monkeypatch.setattr(transport, "run_step", partial(overhear, forget_positions=True))
        untold = summed_loss(split, packed())
        theirs = summed_loss(whole, packed())
    assert torch.equal(heard[0].positions_BT, packed()["position_ids"])
    assert heard[0].mask_columns_BT is None
    assert distance(told, theirs) <= CLOSE
    assert distance(untold, theirs) > CLOSE


@settings(deadline=None)
@given(st.lists(st.integers(1, MAX_TOKENS), max_size=40))
def test_every_example_is_in_one_row_whole_and_once(lengths):
    examples = [example(length, seed=n) for n, length in enumerate(lengths)]
    rows = pack(examples, MAX_TOKENS, PAD)
    found = []
    for row in rows:
        assert {len(values) for values in row.values()} == {MAX_TOKENS}
        starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], MAX_TOKENS], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            assert row["labels"][start] == IGNORED
            found.append({"input_ids": row["input_ids"][start:end], "labels": row["labels"][start:end]})
    for each in examples:
        found.remove(each)
    assert all(set(tail["input_ids"]) == {PAD} and not learned(tail) for tail in found)
    assert rows == pack(examples, MAX_TOKENS, PAD)


def test_rows_are_filled_well():
    """No worse than 11/9 of the fewest rows, as best fit decreasing promises; one by one it would be 100."""
    lengths = torch.randint(2, 13, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    fewest = -(-sum(lengths) // MAX_TOKENS)
    assert len(pack([example(length) for length in lengths], MAX_TOKENS, PAD)) <= fewest * 11 / 9 + 1


def test_rows_keep_the_examples_order():
    rows = pack([example(length, seed=n) for n, length in enumerate([2, 20, 3, 4])], 24, PAD)
    assert [row["input_ids"][0] for row in rows] == [
        example(2, seed=0)["input_ids"][0],
        example(20, seed=1)["input_ids"][0],
    ]


def test_an_example_that_is_longer_than_a_row_is_refused():
    with pytest.raises(DataError, match="25 tokens does not fit into a row of 24"):
        pack([example(25)], MAX_TOKENS, PAD)


def test_a_foreign_examples_first_label_is_not_learned():
    """Else the last token of the example before it would be taught to predict it."""
    ids = [5, 6, 7]
    (row,) = pack([{"input_ids": ids, "labels": ids}] * 2, 6, PAD)
    assert row["labels"] == [IGNORED, 6, 7, IGNORED, 6, 7]
