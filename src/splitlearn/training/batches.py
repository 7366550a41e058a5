"""Examples, or packed rows, as one batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from splitlearn.training.packing import PackedRow
from splitlearn.training.tokens import IGNORED, Tokenized

# B rows   T tokens


def pad_token_of(tokenizer: Any) -> int:
    """What rows are filled with: the padding token, or any other where there is none.

    It may be a token that also occurs in the text, because it is told apart by where it stands.
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """A trainer's `data_collator` for examples a row: filled at the right, whatever the tokenizer's side.

    The library's own collators refuse a tokenizer without a padding token, and take its side.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Tokenized]) -> dict[str, Tensor]:
        """`input_ids`, `labels` (IGNORED where filled) and `attention_mask` (0 where filled), (B, T) each,
        T the longest example's tokens.
        """
        ids = [torch.tensor(example["input_ids"]) for example in examples]
        labels = [torch.tensor(example["labels"]) for example in examples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }


def packed_batch(rows: Sequence[PackedRow]) -> dict[str, Any]:
    """A trainer's `data_collator` for packed rows: `input_ids`, `labels` and `position_ids`, (B, T) each.

    And `use_cache=False`: with a cache the library would take a row for one text, and say nothing.
    """
    return {
        "input_ids": torch.tensor([row["input_ids"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
        "position_ids": torch.tensor([row["position_ids"] for row in rows]),
        "use_cache": False,
    }
