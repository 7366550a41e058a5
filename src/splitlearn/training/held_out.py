"""Which examples are not learned from, but measured on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from splitlearn.errors import DataError

Each = TypeVar("Each")


def held_out(examples: Sequence[Each], share: float, seed: int) -> tuple[list[Each], list[Each]]:
    """Two parts of the examples: to learn from, and held out to measure the loss on.

    Each example, whole, is in exactly one of them, in the order it had; the same examples, share and seed
    give the same parts.

    Args:
        share: of the examples that is held out, 0 <= share < 1. 0 holds none out; otherwise the nearest
            number of examples is, but at least one, and at least one is left to learn from.

    Raises:
        DataError: the share is not in its range, or there are not two examples to part.
    """
    if not 0 <= share < 1:
        raise DataError(f"a share of {share} cannot be held out: name one from 0 up to, not including, 1")
    if share == 0:
        return list(examples), []
    if len(examples) < 2:
        raise DataError(
            f"of {len(examples)} example none can be held out: add examples, or hold out a share of 0"
        )
    count = min(max(round(share * len(examples)), 1), len(examples) - 1)
    draw = random.Random(seed)
    # Of its methods only `random` is promised to give the same in every version of Python.
    draws = [draw.random() for _ in examples]
    chosen = set(sorted(range(len(examples)), key=draws.__getitem__)[:count])
    return (
        [example for index, example in enumerate(examples) if index not in chosen],
        [example for index, example in enumerate(examples) if index in chosen],
    )
