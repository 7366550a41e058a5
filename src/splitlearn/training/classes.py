"""Which class each example is of: the value of a field of its line, or how long its text is."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from splitlearn.errors import DataError
from splitlearn.training.lines import KEYS, Completion, Line, OfLine, Text, kind_of, require_text

LABEL = "label"
"""The field that is looked for where none is named."""
LENGTH = "length"
QUARTERS = 4
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes' names in order, and each example's class as its place among them."""

    names: tuple[str, ...]
    of_example: tuple[int, ...]

    def counts(self, examples: Iterable[int]) -> dict[str, int]:
        """How many of these examples each class has; a class without any is left out."""
        found = Counter(self.of_example[example] for example in examples)
        return {self.names[number]: found[number] for number in sorted(found)}


def one_class(lines: Sequence[Line]) -> Classes:
    """Where classes do not matter."""
    return Classes(("examples",), (0,) * len(lines))


def classes_by(field: str, lines: Sequence[Line]) -> Classes:
    """The class of a line is the field's value: a text, a number, true or false; numbers come first.

    Without a field of that name, `length` means four classes of nearly equal size, from the shortest
    texts to the longest, by their characters.

    Raises:
        DataError: a line does not have the field, or what it has is no such value. The message begins with
            `FILE:LINE:`.
    """
    if field == LENGTH and not any(LENGTH in line.record for line in lines):
        return _by_length([length_of(line.example) for line in lines])
    values = [_value(field, line) for line in lines]
    names = tuple(sorted(set(values), key=_place))
    numbers = {name: number for number, name in enumerate(names)}
    return Classes(names, tuple(numbers[value] for value in values))


def _value(field: str, line: Line) -> str:
    if field not in line.record:
        others = ", ".join(f"`{key}`" for key in line.record if key not in KEYS)
        raise DataError(
            f"{line.where}: the line has no `{field}` to go by: name a field that every line has "
            f"(this one has {others or 'none besides its text'}), or `{LENGTH}`, which needs none"
        )
    value = line.record[field]
    if value is None or isinstance(value, list | dict):
        raise DataError(
            f"{line.where}: `{field}` is {kind_of(value)}, which names no class: make it a text or a number"
        )
    if not isinstance(value, str):
        return json.dumps(value)
    require_text(line.where, f"`{field}`", value)
    return value


def _place(name: str) -> tuple[bool, float, str]:
    is_number = _NUMBER.fullmatch(name) is not None
    return not is_number, float(name) if is_number else 0.0, name


def length_of(example: OfLine) -> int:
    """Characters of all of its texts."""
    if isinstance(example, Text):
        return len(example.text)
    if isinstance(example, Completion):
        return len(example.prompt) + len(example.completion)
    return sum(len(message["content"]) for message in example.messages)


def _by_length(lengths: Sequence[int]) -> Classes:
    """Equal lengths are of one class, so that there may be fewer than four."""
    in_order = sorted(lengths)
    quarters = [QUARTERS * bisect_left(in_order, length) // len(lengths) for length in lengths]
    there = sorted(set(quarters))
    names = tuple(
        _span([at for at, of in zip(lengths, quarters, strict=True) if of == each]) for each in there
    )
    return Classes(names, tuple(there.index(each) for each in quarters))


def _span(lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low} characters" if low == high else f"{low} to {high} characters"
