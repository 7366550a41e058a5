"""Several examples in one row, none of which sees another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, TypedDict

from splitlearn.errors import DataError, SettingError
from splitlearn.model.families import family_of
from splitlearn.training.tokens import IGNORED, Tokenized

BLIND_TO_POSITIONS = frozenset({"falcon", "gpt_oss", "opt"})
"""Families whose class makes its masks without the positions, so that packed examples see each other."""


class PackedRow(TypedDict):
    """Three lists of `max_tokens` each; positions begin at 0 with each example and with the padding.

    There is no attention mask: without one, the library tells the examples apart by their positions.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]


def require_packable(config: Any) -> None:
    """Refuse what would be learned otherwise packed than alone.

    Args:
        config: the model's, of the library.

    Raises:
        SettingError: in this family an example would see the others of its row.
        UnsupportedModel: this model cannot be split at all.
    """
    family = family_of(config)
    reason = family.reason
    if config.model_type in BLIND_TO_POSITIONS:
        reason = "its masks do not part the examples of a row"
    if reason:
        raise SettingError(
            f"{config.model_type} cannot learn from packed examples ({reason}): train it without packing"
        )


def pack(examples: Sequence[Tokenized], max_tokens: int, pad_token_id: int) -> list[PackedRow]:
    """Every example once, whole, in rows of `max_tokens` tokens: the longest first, where it fits best.

    The same examples give the same rows; rows and the examples in them keep the examples' order.

    Args:
        pad_token_id: what a row's end is filled with; it is never learned, and no example sees it.

    Raises:
        DataError: an example is longer than a row.
    """
    longest = max((len(example["input_ids"]) for example in examples), default=0)
    if longest > max_tokens:
        raise DataError(
            f"an example of {longest} tokens does not fit into a row of {max_tokens}: cut it first"
        )
    rows = _assign([len(example["input_ids"]) for example in examples], max_tokens)
    return [_row([examples[index] for index in row], max_tokens, pad_token_id) for row in rows]


def _assign(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Each row's examples, by index: best fit decreasing."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, row) of the rows that are not full, sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect_left(spaces, (lengths[index], 0))
        if at < len(spaces):
            free, row = spaces.pop(at)
        else:
            free, row = max_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        if free > lengths[index]:
            insort(spaces, (free - lengths[index], row))
    return sorted(sorted(row) for row in rows)


def _row(examples: Sequence[Tokenized], max_tokens: int, pad_token_id: int) -> PackedRow:
    row: PackedRow = {"input_ids": [], "labels": [], "position_ids": []}
    padding = max_tokens - sum(len(example["input_ids"]) for example in examples)
    # As one more example, so that no position goes on past the last one's end.
    tail: Tokenized = {"input_ids": [pad_token_id] * padding, "labels": [IGNORED] * padding}
    for example in (*examples, tail) if padding else examples:
        row["input_ids"] += example["input_ids"]
        # An example's first token would be predicted by the one before it in the row.
        row["labels"] += [IGNORED, *example["labels"][1:]]
        row["position_ids"] += range(len(example["input_ids"]))
    return row
