"""What every measurement of `splitlearn bench` ends with: JSON for programs, a table for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout in place of the table.")]
Output = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the same JSON object here, for `splitlearn bench plot`."),
]


class Counts(tuple[int, ...]):
    """Numbers above 0, as an option takes them: one word."""


def parse_counts(written: str) -> Counts:
    """Raises BadParameter for what is not numbers above 0 with commas between."""
    try:
        counts = Counts(int(each) for each in written.split(","))
    except ValueError:
        counts = Counts()
    if not counts or min(counts) < 1:
        raise typer.BadParameter(f"{written!r} is not a list of numbers above 0, as in 1,2,4,8")
    return counts


@dataclass(frozen=True, slots=True)
class Table:
    """Each column's head, and how its cell is made of a row of figures."""

    columns: Mapping[str, str]

    def print(self, rows: Sequence[Mapping[str, Any]]) -> None:
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(*self.columns, box=None)
        for row in rows:
            table.add_row(*(cell.format(**row) for cell in self.columns.values()))
        Console(highlight=False).print(table)


def report_of(
    question: str, model: str, settings: Mapping[str, Any], rows: Sequence[DataclassInstance]
) -> dict[str, Any]:
    from splitlearn.bench.machine import circumstances

    return {
        "question": question,
        "model": model,
        "settings": dict(settings),
        "circumstances": circumstances(),
        "rows": [asdict(row) for row in rows],
    }


def show(report: Mapping[str, Any], table: Table, *, as_json: bool, output: Path | None) -> None:
    written = json.dumps(report, indent=2)
    if output is not None:
        output.write_text(written + "\n", encoding="utf-8")
    if as_json:
        print(written)
    else:
        table.print(report["rows"])


@contextmanager
def trunk_at(address: str | None, model: str, *options: str) -> Iterator[str]:
    """The address of a trunk that runs, or of one that is started for as long as this lasts."""
    if address is not None:
        yield address
        return
    from splitlearn.cli.trunk_process import TrunkProcess

    with TrunkProcess(model, *options) as process:
        yield process.address
