"""Figures as a picture: how many tokens a second, and how long one takes, against sessions."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn.errors import SettingError

NO_MATPLOTLIB = "a picture needs matplotlib, which is not installed: pip install 'splitlearn[bench]'"
PACE = {
    "steps_per_s": "trunk",
    "tokens_per_s": "split, all sessions",
    "whole_tokens_per_s": "whole model, as one batch",
}
"""What may stand in a row of figures, and what its line is called."""
SIZE_INCHES = (9.0, 4.0)


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

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    pace, latency = figure.subplots(1, 2)
    _plot(pace, paces, "tokens/s")
    _plot(latency, latencies, "ms for a token")
    figure.suptitle(f"{report['question']}: {report['model']}")
    figure.savefig(path, dpi=150)


def _plot(axes: Any, curves: Sequence[Curve], label: str) -> None:
    for curve in curves:
        axes.plot(curve.sessions, curve.values, marker="o", label=curve.name)
    axes.set_xlabel("sessions at once")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def pace_curves(report: Mapping[str, Any]) -> list[Curve]:
    """Those of PACE that the report has; a whole model that was not run has no line."""
    rows = _rows(report)
    return [_curve(rows, PACE[name], [row[name] for row in rows]) for name in PACE if rows[0].get(name)]


def latency_curves(report: Mapping[str, Any]) -> list[Curve]:
    rows = _rows(report)
    return [
        _curve(rows, name.removesuffix("_ms"), [row["latency"][name] for row in rows])
        for name in rows[0]["latency"]
    ]


def _curve(rows: Sequence[Mapping[str, Any]], name: str, values: Sequence[float]) -> Curve:
    return Curve(name, [row["sessions"] for row in rows], values)


def _rows(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = report.get("rows")
    if not rows or any("sessions" not in row or "latency" not in row for row in rows):
        raise SettingError("there are no figures against sessions: give what `splitlearn bench` wrote")
    return sorted(rows, key=lambda row: row["sessions"])
