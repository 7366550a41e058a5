import torch

from splitlearn.training.batches import PaddedBatch, packed_batch, pad_token_of
from splitlearn.training.packing import pack
from splitlearn.training.tokens import IGNORED

SHORT = {"input_ids": [5, 9], "labels": [IGNORED, 9]}
LONG = {"input_ids": [6, 7, 8, 9], "labels": [IGNORED, IGNORED, 8, 9]}


def test_examples_are_filled_at_the_right():
    batch = PaddedBatch(pad_token_id=9)([SHORT, LONG])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 9, 9, 9], [6, 7, 8, 9]],
        "labels": [[IGNORED, 9, IGNORED, IGNORED], [IGNORED, IGNORED, 8, 9]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1]],
    }
    assert {values.dtype for values in batch.values()} == {torch.int64}


def test_a_packed_batch_has_positions_and_no_mask():
    batch = packed_batch(pack([SHORT, LONG], 8, 0))
    assert batch.pop("use_cache") is False
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 9, 6, 7, 8, 9, 0, 0]],
        "labels": [[IGNORED, 9, IGNORED, IGNORED, 8, 9, IGNORED, IGNORED]],
        "position_ids": [[0, 1, 0, 1, 2, 3, 0, 1]],
    }


def test_a_tokenizer_without_padding_lends_another_token(tokenizer_of):
    assert pad_token_of(tokenizer_of()) == 0
    assert pad_token_of(tokenizer_of(pad_token=None)) == 2
    assert pad_token_of(tokenizer_of(pad_token=None, eos_token=None)) == 0
