"""Where the clients stand, as a table that is drawn again and again, or as lines where nobody watches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from splitlearn.cli.simulation.clients import Client
from splitlearn.cli.simulation.simulation import Show
from splitlearn.cli.simulation.summary import Summary

DRAWN_A_SECOND = 4
NOTHING = "-"


@contextmanager
def shown(console: Console) -> Iterator[Show]:
    """Takes the clients whenever they may have changed."""
    if not console.is_terminal:
        yield Lines(console).show
        return
    with Live(console=console, refresh_per_second=DRAWN_A_SECOND) as live:
        yield lambda clients: live.update(table_of(clients))


class Lines:
    """A line for each new step, and for each start and end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: dict[str, tuple[int, int, int, bool]] = {}

    def show(self, clients: Sequence[Client]) -> None:
        for client in clients:
            now = (client.step, client.starts, client.kills, client.is_over)
            if self._told.get(client.name, (0, 0, 0, False)) != now:
                self._told[client.name] = now
                self._console.print(line_of(client))


def line_of(client: Client) -> str:
    loss = "" if client.loss is None else f", loss {client.loss:.4f}"
    return f"{client.name}: {client.activity.value}, step {client.step} of {client.steps}{loss}"


def table_of(clients: Sequence[Client]) -> Table:
    """A row for each client."""
    table = Table(box=None)
    table.add_column("client")
    for name in ("step", "loss", "staleness", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for client in clients:
        table.add_row(
            client.name,
            f"{client.step} of {client.steps}",
            _figure(client.loss, ".4f"),
            _figure(client.staleness, "d"),
            _figure(client.tokens_per_s, ",.0f"),
            _state(client),
        )
    return table


def summary_table(summary: Summary) -> Table:
    """What came of it, a row for each client."""
    table = Table(box=None)
    table.add_column("client")
    for name in ("examples", "steps", "merged", "dropped", "refused", "staleness", "held-out loss"):
        table.add_column(name, justify="right")
    for client in summary.clients:
        counts = (client.examples, client.steps, client.merged, client.dropped, client.refused)
        table.add_row(
            client.name,
            *(f"{count:,}" for count in counts),
            _figure(client.mean_staleness, ".2f"),
            _figure(client.held_out_loss, ".4f"),
        )
    return table


def _state(client: Client) -> str:
    again = f", begun {client.starts} times" if client.starts > 1 else ""
    slow = f", {client.factor:g} times slower" if client.factor > 1 else ""
    return f"{client.activity.value}{again}{slow}"


def _figure(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)
