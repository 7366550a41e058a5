"""Who holds what, as a picture: a row a client, a bar of its classes, the counts in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn.bench.picture import DOTS_PER_INCH
from splitlearn.cli.holdings_columns import columns_of, shown

if TYPE_CHECKING:
    from splitlearn.cli.holdings import Partition

WIDTH_INCHES, ROW_INCHES, MARGIN_INCHES, TALLEST_INCHES = 9.0, 0.3, 1.4, 31.4
ROWS_WITH_TEXT = round((TALLEST_INCHES - MARGIN_INCHES) / ROW_INCHES)
"""Of more clients the rows are too low for names and counts."""
DIGIT = 0.015
"""Part of the longest bar that a digit takes."""
REST = (0.85, 0.85, 0.85)
BRIGHT = 0.5


def draw(dealt: Partition, path: Path) -> None:
    """Write the picture; the file's ending says in which format. Needs matplotlib."""
    from matplotlib.figure import Figure

    columns = columns_of(dealt)
    totals = [len(holding.examples) for holding in dealt.holdings]
    rows = max(len(totals), len(columns.names))
    height = min(MARGIN_INCHES + ROW_INCHES * rows, TALLEST_INCHES)
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    bars = _stack(axes, columns.counts if columns.names else [[total] for total in totals], columns.has_rest)
    axes.set(xlabel="examples", xlim=(0, 1.1 * max(totals)), ylim=(len(totals) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_yticks([])
    if len(totals) <= ROWS_WITH_TEXT:
        axes.set_yticks(range(len(totals)), [holding.name for holding in dealt.holdings])
        axes.bar_label(bars[-1], [f"{total:,}" for total in totals], padding=4)
    else:
        axes.set_ylabel(f"{len(totals):,} files")
    if columns.names:
        _name(axes, bars, columns.names)
    figure.suptitle(title_of(dealt), fontsize="medium", parse_math=False)
    figure.savefig(path)


def title_of(dealt: Partition) -> str:
    """Which file, and how it was dealt out."""
    told = dealt.settings.told
    how = [str(told.pop("scheme"))]
    how += [
        f"{name.replace('_', ' ')} {value}"
        for name, value in told.items()
        if (name, value) != ("held_out", 0)
    ]
    return f"{shown(dealt.file.name)}: {len(dealt.lines):,} examples\n{shown(', '.join(how), longest=90)}"


def _stack(axes: Any, counts: list[list[int]], has_rest: bool) -> list[Any]:
    """A container of bars for each column, beside those before it."""
    from matplotlib.colors import TABLEAU_COLORS, to_rgb

    reached, longest = [0] * len(counts), max(map(sum, counts))
    colours = [to_rgb(name) for name in TABLEAU_COLORS]
    bars = []
    for place, column in enumerate(zip(*counts, strict=True)):
        is_rest = has_rest and place == len(counts[0]) - 1
        colour = REST if is_rest else colours[place]
        bars.append(axes.barh(range(len(counts)), column, left=reached, color=colour))
        if len(counts) <= ROWS_WITH_TEXT and len(counts[0]) > 1:
            # Where there is room; the whole row's count stands beside it anyway.
            told = [f"{count:,}" if count > DIGIT * longest * len(f" {count:,}") else "" for count in column]
            ink = "black" if _luminance(colour) > BRIGHT else "white"
            axes.bar_label(bars[-1], told, label_type="center", color=ink, fontsize="small")
        reached = [start + count for start, count in zip(reached, column, strict=True)]
    return bars


def _luminance(colour: tuple[float, float, float]) -> float:
    red, green, blue = colour
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _name(axes: Any, bars: list[Any], names: list[str]) -> None:
    legend = axes.legend(bars, names, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
