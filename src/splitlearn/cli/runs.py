"""`splitlearn runs`: the trainings that a server holds, open or on its disk."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitlearn.cli.options import parse_address
from splitlearn.cli.sizes import show_bytes
from splitlearn.config import ClientConfig

if TYPE_CHECKING:
    from splitlearn.wire.messages import RunFacts


def runs(
    server: Annotated[
        str, typer.Argument(parser=parse_address, metavar="HOST:PORT", help="The trunk server.")
    ],
    delete: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Remove this run, from the server's memory and from its disk."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of the table.")] = False,
) -> None:
    """The trainings that a server holds; `--delete` removes one."""
    from splitlearn.client.calls import delete_run, list_runs

    timeout_s = ClientConfig().connect_s
    if delete is not None:
        freed_bytes = delete_run(server, delete, timeout_s)
        told = json.dumps({"deleted": delete, "freed_bytes": freed_bytes})
        print(told if as_json else f"{delete} is gone; {show_bytes(freed_bytes)} of disk are free again")
        return
    found = sorted(list_runs(server, timeout_s), key=lambda run: run.name)
    if as_json:
        print(json.dumps({"runs": [figures(run) for run in found]}))
    else:
        _print_table(found)


def figures(run: RunFacts) -> dict[str, Any]:
    return {
        "name": run.name,
        "state": run.state,
        "step": run.step,
        "version": run.version,
        "checkpoints": list(run.checkpoints),
        "bytes_on_disk": run.bytes_on_disk,
        "cohort": _cohort_figures(run),
    }


def _cohort_figures(run: RunFacts) -> dict[str, Any] | None:
    cohort = run.settings.cohort
    if cohort.is_private:
        return None
    return {
        "rule": cohort.rule,
        "members": cohort.members,
        "active_members": run.active_members,
        "known_members": run.known_members,
    }


def _print_table(found: list[RunFacts]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = ("run", "state", "step", "version", "rule", "members", "checkpoints", "on disk")
    table = Table(*names, box=None)
    for run in found:
        kept = ", ".join(map(str, run.checkpoints)) or "none"
        figures = (str(run.step), str(run.version))
        table.add_row(run.name, run.state, *figures, *_shared(run), kept, show_bytes(run.bytes_on_disk))
    Console(highlight=False).print(table if found else "no runs")


def _shared(run: RunFacts) -> tuple[str, str]:
    """The rule, and how many of its members are there; of a run on the disk nobody is."""
    from splitlearn.wire.messages import SAVED

    cohort = run.settings.cohort
    if run.state == SAVED or cohort.is_private:
        return "-", "-"
    return cohort.rule, f"{run.active_members} of {max(cohort.members, run.known_members)}"
