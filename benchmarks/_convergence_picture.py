"""Held-out loss against tokens: a panel a partition, a line a rule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splitlearn.bench.picture import DOTS_PER_INCH

PANELS = {"iid": "IID", "dirichlet": "Dirichlet by source"}
STYLES = {
    "single": {"color": "black", "linestyle": "--", "marker": ""},
    # Wider: quorum lies on it where nobody is late.
    "sync": {"color": "tab:blue", "marker": "o", "linewidth": 5, "markersize": 9, "alpha": 0.5},
    "quorum": {"color": "tab:orange", "marker": "s"},
    "async": {"color": "tab:green", "marker": "^"},
    "buffered": {"color": "tab:purple", "marker": "D"},
    "private": {"color": "tab:red", "linestyle": ":", "marker": ""},
}
NAMES = {"single": "one client with all data", "private": "each by itself, mean at the end"}


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Write the picture of what there is so far; the file's ending says in which format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.4), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (scheme, title) in zip(panels, PANELS.items(), strict=True):
        _panel(axes, figures["rules"], scheme)
        axes.set(title=title, xlabel="learned tokens of all clients together")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss (nats a token)")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    if lines:
        figure.legend(
            lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), 3), frameon=False
        )
    figure.savefig(path)


def _panel(axes: Any, rules: Mapping[str, Any], scheme: str) -> None:
    for name, each in rules.items():
        rule, of = name.split("/")
        if of not in (scheme, "all"):
            continue
        style: dict[str, Any] = {"label": NAMES.get(rule, rule), "markersize": 5} | STYLES[rule]
        if rule == "private":
            axes.axhline(each["loss"], **style)
        else:
            axes.plot(*zip(*each["points"], strict=True), **style)
