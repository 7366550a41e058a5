"""`splitlearn partition`: one file of examples dealt out to the clients of a simulation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitlearn.cli.options import with_options_of
from splitlearn.cli.scheme_settings import PartitionSettings

if TYPE_CHECKING:
    from splitlearn.cli.holdings import Partition

PICTURE = "partition.png"


@with_options_of(PartitionSettings)
def partition(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .jsonl file, an example a line.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write; it must be new or empty.", show_default="FILE-partition, here"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="What stands in partition.json, in place of the table.")
    ] = False,
    **told: Any,
) -> None:
    """Data for the clients of a simulation: one file dealt out, and a picture of who holds what.

    Each line goes, as it stands, to one client's file or to those held out.
    """
    from splitlearn.cli.holdings import Partition
    from splitlearn.cli.new_folder import new_folder
    from splitlearn.training.lines import read_lines

    settings = PartitionSettings(**told).filled_in()
    dealt = Partition.of(file, read_lines(file), settings)
    output = output or Path(f"{file.stem}-partition")
    with new_folder(output) as growing:
        dealt.write_into(growing)
        draw_if_possible(dealt, growing / PICTURE)
    if as_json:
        print(json.dumps(dealt.record, indent=2))
    else:
        _print_table(dealt, output)


def draw_if_possible(dealt: Partition, picture: Path) -> None:
    """The data are worth having without it."""
    from splitlearn.bench.picture import require_matplotlib
    from splitlearn.cli.holdings_picture import draw
    from splitlearn.errors import SettingError

    try:
        require_matplotlib()
    except SettingError as error:
        print(f"no picture: {error.message}", file=sys.stderr)
    else:
        draw(dealt, picture)


def _print_table(dealt: Partition, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from splitlearn.cli.holdings_columns import columns_of

    columns = columns_of(dealt)
    table = Table(box=None)
    table.add_column("")
    for name in ("examples", *columns.names):
        table.add_column(Text(name), justify="right")
    for holding, counts in zip(dealt.holdings, columns.counts, strict=True):
        cells = (f"{count:,}" if count else "-" for count in counts)
        table.add_row(holding.name, f"{len(holding.examples):,}", *cells)
    Console(highlight=False).print(table)
    print(f"{output}: {len(dealt.lines):,} examples in {len(dealt.holdings)} files")
