"""What was found, as tables and a picture, written anew after each case; and what falls short."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import _common
from _common import markdown, write
from _convergence import CLIENTS, SINGLE, SLOWNESS, Point
from _convergence_picture import draw

WANTED_FALL, WANTED_WORSE = 0.3, 0.01


def loss_at(points: Sequence[Point], tokens: float) -> float | None:
    """On the straight line between two looks; None beyond the last."""
    for (left, high), (right, low) in pairwise(points):
        if left <= tokens <= right:
            return high + (low - high) * (tokens - left) / (right - left)
    return None


def report(figures: dict[str, Any]) -> None:
    """After each case, so that nothing is lost where the next one fails."""
    tables = []
    if figures.get("rules"):
        tables += [rules_table(figures)]
        draw(figures, _common.RESULTS / "convergence.png")
        tables += ["![held-out loss against tokens](convergence.png)"]
    if figures.get("straggler"):
        tables += [straggler_table(figures["straggler"], figures["seconds"])]
    told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures["setting"].items())
    write("convergence", figures, "\n\n".join([*tables, f"Setting: {told}."]))


def rules_table(figures: dict[str, Any]) -> str:
    rules, before = figures["rules"], figures["before"]
    one = rules.get(f"{SINGLE}/all", {}).get("loss")
    rows = []
    for name, each in rules.items():
        worse = f"{each['loss'] / one - 1:+.2%}" if one else ""
        rule, scheme = name.split("/")
        fall = before - each["loss"]
        cells = (f"{each['loss']:.4f}", f"{fall:.4f}", worse, f"{each['tokens']:,.0f}")
        rows.append((rule, scheme, *cells, f"{each['seconds']:.0f}"))
    header = (
        "rule",
        "data",
        f"held-out loss, nats (before: {before:.4f})",
        "fall",
        "over one client's (wanted of sync, iid: <= +1 %)",
        "tokens merged",
        "seconds",
    )
    return markdown(header, rows)


def straggler_table(found: dict[str, Any], seconds: float) -> str:
    sync = found.get("sync")
    rows = []
    for rule, each in found.items():
        there = loss_at(each["points"], sync["tokens"]) if sync else None
        ratio = f"{each['tokens_per_s'] / sync['tokens_per_s']:.2f}" if sync else ""
        cells = (f"{each['tokens_per_s']:.1f}", ratio, f"{each['tokens']:,.0f}", f"{each['loss']:.4f}")
        rows.append((rule, *cells, f"{there:.4f}" if there is not None else "not reached"))
    header = (
        f"one of {CLIENTS} takes {SLOWNESS:g} x as long",
        "tokens merged a second",
        "over sync's",
        f"tokens in {seconds:g} s",
        "held-out loss then",
        "held-out loss at sync's tokens, between two looks",
    )
    return markdown(header, rows)


def shortcomings(figures: dict[str, Any]) -> list[str]:
    rules = figures.get("rules", {})
    one, sync = rules.get(f"{SINGLE}/all"), rules.get("sync/iid")
    wrong = []
    if one and figures["before"] - one["loss"] < WANTED_FALL:
        wrong.append(f"one client's loss fell by less than {WANTED_FALL}")
    if one and sync and sync["loss"] > (1 + WANTED_WORSE) * one["loss"]:
        wrong.append("sync's loss is more than 1 % over one client's")
    return wrong
