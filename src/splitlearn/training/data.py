"""The user's files as what a trainer takes: examples to learn, examples held out, and a collator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from splitlearn.errors import DataError
from splitlearn.training.batches import PaddedBatch, packed_batch, pad_token_of
from splitlearn.training.held_out import held_out
from splitlearn.training.lines import Files, read_examples
from splitlearn.training.packing import PackedRow, pack, require_packable
from splitlearn.training.tokens import Tokenization, Tokenized, tokenize

Rows = list[Tokenized] | list[PackedRow]


@dataclass(frozen=True, slots=True)
class TrainingData:
    """A trainer's `train_dataset`, `eval_dataset` and `data_collator`, and what became of the files."""

    train: Rows
    held_out: Rows
    """Empty where no share was asked for."""
    collate: Callable[[Any], dict[str, Any]]
    train_examples: int
    held_out_examples: int
    truncated: int
    """Examples that were longer than `max_tokens` and are learned up to there."""
    dropped: int
    """Examples that are left out, because nothing that is learned lies within `max_tokens`."""


def training_data(
    files: Files,
    tokenizer: Any,
    *,
    max_tokens: int,
    held_out_share: float = 0.0,
    seed: int = 0,
    pack_for: Any = None,
) -> TrainingData:
    """Read, tokenize, split and pack.

    Args:
        files: one or several; `read_examples` says what stands in them.
        tokenizer: the model's, of the library.
        max_tokens: of an example, and of a packed row.
        held_out_share: as in `held_out`.
        seed: of the choice of what is held out.
        pack_for: the model's configuration, to have several examples in a row; None gives each its own.

    Raises:
        DataError: a line is wrong (`FILE:LINE: ...`), or too little is left to learn from.
        SettingError: `max_tokens` is too small, or this model cannot learn from packed rows.
        UnsupportedModel: this model cannot be split at all.
    """
    if pack_for is not None:
        require_packable(pack_for)
    tokenized = tokenize(read_examples(files), tokenizer, max_tokens)
    _require_some(tokenized, max_tokens)
    train, kept_back = held_out(tokenized.examples, held_out_share, seed)
    pad_token = pad_token_of(tokenizer)
    is_packed = pack_for is not None
    return TrainingData(
        train=pack(train, max_tokens, pad_token) if is_packed else train,
        held_out=pack(kept_back, max_tokens, pad_token) if is_packed else kept_back,
        collate=packed_batch if is_packed else PaddedBatch(pad_token),
        train_examples=len(train),
        held_out_examples=len(kept_back),
        truncated=tokenized.truncated,
        dropped=tokenized.dropped,
    )


def _require_some(tokenized: Tokenization, max_tokens: int) -> None:
    if not tokenized.examples:
        raise DataError(
            f"nothing of the {tokenized.dropped} examples is learned within max_tokens = {max_tokens}: "
            "raise max_tokens"
        )
