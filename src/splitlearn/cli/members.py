"""`splitlearn members`: who trains a run together, as the server tells one of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitlearn.cli.options import Trunk
from splitlearn.config import ClientConfig
from splitlearn.errors import SettingError

if TYPE_CHECKING:
    from rich.table import Table

    from splitlearn.wire.messages import MemberFacts, RunFacts


def members(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")],
    trunk: Trunk,
    member_key: Annotated[
        Path,
        typer.Option(help="A member's key, `member.key` in its output folder: the others are told to it."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of the table.")] = False,
) -> None:
    """Who trains a run together, and where each of them stands; only members are told."""
    from rich.console import Console

    from splitlearn.client.calls import run_facts
    from splitlearn.client.member_key import read_key

    facts = run_facts(trunk, run, read_key(member_key), ClientConfig().connect_s)
    _require_known(facts, member_key)
    if as_json:
        print(json.dumps(figures(facts)))
        return
    Console(highlight=False).print(table_of(facts))
    print(_line_of(facts))


def figures(run: RunFacts) -> dict[str, Any]:
    return {
        "run": run.name,
        "step": run.step,
        "version": run.version,
        "cohort": asdict(run.settings.cohort),
        "members": [_figures_of(member) for member in run.members],
    }


def table_of(run: RunFacts) -> Table:
    """A row for each member, in the order in which they came."""
    from rich.table import Table

    table = Table("member", "state", "incarnation", "step", "version", "lease left", "last gave", box=None)
    for member in run.members:
        table.add_row(
            member.name,
            member.state,
            str(member.incarnation),
            str(member.step),
            _version(member, run.version),
            f"{member.lease_left_s:.0f} s" if member.lease_left_s else "-",
            _last(member),
        )
    return table


def _version(member: MemberFacts, newest: int) -> str:
    """What its step underway is computed at."""
    if member.version is None:
        return "-"
    behind = newest - member.version
    return f"{member.version}, {behind} behind" if behind else str(member.version)


def _last(member: MemberFacts) -> str:
    """What became of the gradients that it gave last."""
    last = member.last
    if last is None:
        return "skipped" if member.step else "nothing yet"
    where = f" in round {last.round}" if last.round else ""
    stale = f", {last.staleness} versions old" if last.staleness else ""
    return f"{last.fate.name.lower()}{where}{stale}"


def _figures_of(member: MemberFacts) -> dict[str, Any]:
    told = asdict(member)
    if member.last is not None:
        told["last"] = asdict(member.last) | {"fate": member.last.fate.name.lower()}
    return told


def _line_of(run: RunFacts) -> str:
    return (
        f"{run.name}: rule {run.settings.cohort.rule}, round {run.step}, version {run.version}, "
        f"{run.active_members} of {run.known_members} members there"
    )


def _require_known(run: RunFacts, key: Path) -> None:
    if run.members:
        return
    if not run.known_members:
        raise SettingError(
            f"run {run.name} has no members here ({run.state}): a cohort's run has, while it is open"
        )
    raise SettingError(
        f"run {run.name} has {run.known_members} members, and {key} is the key of none of them: give a "
        "member's (`member.key` in its output folder)"
    )
