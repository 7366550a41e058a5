"""Who holds what, in as many classes as a table or a picture has room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splitlearn.cli.holdings import Partition

ROOM = 10
"""Classes that are told apart; of more, the largest are, and the rest goes together."""
LONGEST_NAME = 24


@dataclass(frozen=True, slots=True)
class Columns:
    """A name for each column, and each holding's count in it."""

    names: list[str]
    counts: list[list[int]]
    has_rest: bool = False
    """The last column has all classes that have none of their own."""


def columns_of(dealt: Partition) -> Columns:
    """The classes in their order; none where there is but one, which the examples' number tells."""
    whole = dealt.classes.counts(range(len(dealt.lines)))
    if len(dealt.classes.names) == 1:
        return Columns([], [[] for _ in dealt.holdings])
    largest = sorted(whole, key=lambda name: -whole[name])[: ROOM - 1]
    own = [name for name in whole if len(whole) <= ROOM or name in largest]
    rows = [dealt.classes.counts(holding.examples) for holding in dealt.holdings]
    names, counts = [shown(name) for name in own], [[row.get(name, 0) for name in own] for row in rows]
    others = len(whole) - len(own)
    if others:
        names.append(f"{others} others")
        counts = [
            [*told, len(holding.examples) - sum(told)]
            for told, holding in zip(counts, dealt.holdings, strict=True)
        ]
    return Columns(names, counts, has_rest=others > 0)


def shown(name: str, longest: int = LONGEST_NAME) -> str:
    """On one short line, whatever the file has for it."""
    line = "".join(sign if sign.isprintable() else " " for sign in name)
    return line if len(line) <= longest else line[: longest - 1] + "…"
