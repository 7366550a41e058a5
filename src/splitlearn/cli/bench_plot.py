"""`splitlearn bench plot`: a picture of what a measurement wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def plot(
    figures: Annotated[Path, typer.Argument(metavar="FILE", help="What `bench rps` or `decode` wrote.")],
    output: Annotated[
        Path, typer.Option(metavar="PICTURE", help="Where the picture goes: .png, .svg, .pdf.")
    ],
) -> None:
    """Draw tokens a second and latency against sessions; needs matplotlib."""
    from splitlearn.bench.picture import draw
    from splitlearn.errors import SettingError

    try:
        report = json.loads(figures.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(f"{figures} cannot be read as JSON: {error}") from None
    draw(report, output)
    print(f"{output}: {len(report['rows'])} numbers of sessions")
