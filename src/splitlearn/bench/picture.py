"""Figures as a picture: how many tokens a second, and how long one takes, against sessions."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn.errors import SettingError

NO_MATPLOTLIB = "a picture needs matplotlib, which is not installed: pip install 'splitlearn[bench]'"
PACE = {
    "steps_per_s": "trunk, all sessions",
    "tokens_per_s": "split, all sessions",
    "whole_tokens_per_s": "whole model, as many rows in one batch",
    "whole_alone_tokens_per_s": "whole model, one row",
}
"""What may stand in a row of figures, and what its line is called."""
PERCENTILES = {"p50_ms": "half within (p50)", "p95_ms": "95 % within (p95)", "p99_ms": "99 % within (p99)"}
UNITS = {"rps": "step", "decode": "token"}
"""What a measurement counts."""
SIZE_INCHES, DOTS_PER_INCH = (8.0, 4.2), 150
DASHED = "whole"
ROOM = 0.08
"""Part of an axis that a number below it takes."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of the picture."""

    name: str
    sessions: Sequence[int]
    values: Sequence[float]


def require_matplotlib() -> None:
    """Raises SettingError where it is not installed: ask before what takes long."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingError(NO_MATPLOTLIB)


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a report; the file's ending says in which format.

    Raises:
        SettingError: matplotlib is not installed, or the report has no figures against sessions.
    """
    require_matplotlib()
    paces, latencies = pace_curves(report), latency_curves(report)

    from matplotlib.figure import Figure

    unit = UNITS.get(str(report.get("question")), "token")
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    pace, latency = figure.subplots(1, 2)
    _plot(pace, paces, f"{unit}s per second")
    _plot(latency, latencies, f"latency of a {unit} (ms)")
    figure.suptitle(title_of(report), fontsize="medium")
    figure.savefig(path)


def title_of(report: Mapping[str, Any]) -> str:
    """What was measured, of which model, with prompts and texts of which length."""
    settings = report.get("settings") or {}
    lengths = (
        f"{name.removesuffix('_tokens')} {settings[name]}"
        for name in ("prompt_tokens", "new_tokens", "text_tokens")
        if name in settings
    )
    model = Path(str(report.get("model", ""))).name
    tokens = ", ".join(lengths)
    return f"{report.get('question', '')}: {model}" + (f" (tokens: {tokens})" if tokens else "")


def _plot(axes: Any, curves: Sequence[Curve], label: str) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    for curve in curves:
        dashed = curve.name.startswith(DASHED)
        axes.plot(
            curve.sessions, curve.values, marker="o", linestyle="--" if dashed else "-", label=curve.name
        )
    sessions = curves[0].sessions
    axes.set_xlabel("sessions at once")
    if len(sessions) > 1:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks_of(sessions)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    # Below, where no curve can run through it.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)


def ticks_of(sessions: Sequence[int]) -> list[int]:
    """Those of sorted numbers that have room beside each other on an axis by doublings, the largest first."""
    apart = ROOM * math.log(sessions[-1] / sessions[0])
    kept: list[int] = []
    for each in reversed(sessions):
        if not kept or math.log(kept[0] / each) > apart:
            kept.insert(0, each)
    return kept


def pace_curves(report: Mapping[str, Any]) -> list[Curve]:
    """Those of PACE that the report has; a whole model that was not run has no line."""
    rows = _rows(report)
    return [_curve(rows, PACE[name], [row[name] for row in rows]) for name in PACE if rows[0].get(name)]


def latency_curves(report: Mapping[str, Any]) -> list[Curve]:
    rows = _rows(report)
    return [
        _curve(rows, PERCENTILES.get(name, name), [row["latency"][name] for row in rows])
        for name in rows[0]["latency"]
    ]


def _curve(rows: Sequence[Mapping[str, Any]], name: str, values: Sequence[float]) -> Curve:
    return Curve(name, [row["sessions"] for row in rows], values)


def _rows(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = report.get("rows")
    if not rows or any("sessions" not in row or "latency" not in row for row in rows):
        raise SettingError("there are no figures against sessions: give what `splitlearn bench` wrote")
    return sorted(rows, key=lambda row: row["sessions"])
