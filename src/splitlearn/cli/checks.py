"""Checks, each a line: what was looked at, how it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from rich.console import Console
from rich.text import Text

NAME_WIDTH = 22


class Outcome(Enum):
    """How a check came out; only `FAILED` makes the command fail."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


STYLES = {
    Outcome.OK: "green",
    Outcome.WARNING: "yellow",
    Outcome.FAILED: "bold red",
    Outcome.SKIPPED: "dim",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the list; `mend` says what to do where it is not ok."""

    name: str
    outcome: Outcome
    found: str
    mend: str = ""


def ok(name: str, found: str) -> Check:
    return Check(name, Outcome.OK, found)


def warning(name: str, found: str, mend: str) -> Check:
    return Check(name, Outcome.WARNING, found, mend)


def failed(name: str, found: str, mend: str = "") -> Check:
    return Check(name, Outcome.FAILED, found, mend)


def skipped(name: str, found: str) -> Check:
    return Check(name, Outcome.SKIPPED, found)


def print_checks(checks: Iterable[Check]) -> bool:
    """Print each as it is done; whether none has failed."""
    console = Console(highlight=False)
    all_right = True
    for check in checks:
        console.print(line_of(check), soft_wrap=True)
        all_right &= check.outcome is not Outcome.FAILED
    return all_right


def line_of(check: Check) -> Text:
    line = Text(f"{check.outcome.value:<8}", style=STYLES[check.outcome])
    line.append(f"{check.name:<{NAME_WIDTH}}", style="not bold default")
    line.append(" ".join(check.found.split()), style="not bold default")
    if check.mend:
        line.append(f": {check.mend}", style="not bold default")
    return line
