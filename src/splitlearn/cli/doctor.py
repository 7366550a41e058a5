"""`splitlearn doctor`: whether this machine can load, reach and run it; each check a line with its mend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from splitlearn.cli.ending import FAILED
from splitlearn.cli.options import parse_address

if TYPE_CHECKING:
    from splitlearn.cli.checks import Check


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub id of the model to look at.")
    ] = None,
    trunk: Annotated[
        str | None,
        typer.Option(parser=parse_address, metavar="HOST:PORT", help="The trunk server to look at."),
    ] = None,
) -> None:
    """Can this machine load, reach and run it?

    Each check is a line, with what to do where it is not ok.
    """
    from splitlearn.cli.checks import print_checks
    from splitlearn.cli.package_checks import package_checks

    # What follows loads the packages, so they come first.
    if not (print_checks(package_checks()) and print_checks(checks_of(model, trunk))):
        raise typer.Exit(FAILED)


def checks_of(model: str | None, trunk: str | None) -> Iterator[Check]:
    """Of this machine, this model and this trunk."""
    from splitlearn.cli.machine_checks import check_attention, check_gpu, check_memory, check_threads
    from splitlearn.cli.trunk_checks import check_model, check_same_model, check_trunk

    yield check_threads(trunk)
    yield check_gpu()
    checkpoint, check = check_model(model)
    yield check
    yield check_attention(checkpoint)
    yield check_memory(checkpoint)
    facts, check = check_trunk(trunk)
    yield check
    yield check_same_model(checkpoint, facts)
