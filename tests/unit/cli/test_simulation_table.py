"""The table shows where each client stands, and the lines say each step once."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from splitlearn.cli.simulation.clients import Client
from splitlearn.cli.simulation.config import Simulation
from splitlearn.cli.simulation.folder import Folder
from splitlearn.cli.simulation.reports import Activity, Does, Ended, Failed, Lost, Stepped
from splitlearn.cli.simulation.summary import summary_of
from splitlearn.cli.simulation.table import Lines, summary_table, table_of
from splitlearn.errors import SimulationFailed
from splitlearn.monitor import events


def client(number: int, *told: object, factor: float = 1.0) -> Client:
    made = Client(number, f"client-{number:02}", 6, factor, Path("nowhere.log"))
    for report in told:
        made.hear(report)
    return made


def drawn(shown: object) -> list[str]:
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(shown)
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def test_each_client_has_a_row():
    busy = client(1, Does(Activity.COMPUTING), Stepped(3, 2000, 0.5, 2), Lost(4.56789), factor=3)
    busy.starts = 2
    done = client(3, Stepped(6, 100, 0.5, None), Ended(6, 5.0, 4.0))
    assert drawn(table_of([busy, client(2), done])) == [
        "client step loss staleness tokens/s state",
        "client-01 3 of 6 4.5679 2 4,000 computing, begun 2 times, 3 times slower",
        "client-02 0 of 6 - - - not begun",
        "client-03 6 of 6 - - 200 done",
    ]


def test_a_line_is_told_when_something_has_changed_and_not_again():
    console = Console(record=True, width=120, file=io.StringIO())
    lines, one = Lines(console), client(1)
    for step in (0, 0, 1, 1, 2):
        one.step = step
        lines.show([one])
    told = console.export_text().splitlines()
    assert [line.rpartition("step ")[2] for line in told] == ["1 of 6", "2 of 6"]


def test_what_a_client_says_of_its_failure_is_named_with_its_log():
    with pytest.raises(SimulationFailed, match=r"client-01: no room; its log is nowhere\.log"):
        client(1, Failed("no room"))


def test_the_summary_counts_what_the_ledger_says(tmp_path):
    parts = [events.Part(f"client-0{n}", 1, 1, 0, 5.0, 1.0, 0.5, staleness=n) for n in (1, 2)]
    told = [
        events.RoundClosed(1, 1, 1e-3, 1.0, 1.0, tuple(parts)),
        events.RoundClosed(2, 2, 1e-3, 1.0, 1.0, (parts[1],)),
        events.Dropped("client-01", 2, 0, 2),
        events.Refused("client-01", 2, 0, 2),
    ]
    (tmp_path / "server" / "run").mkdir(parents=True)
    written = "".join(json.dumps(events.figures(event)) + "\n" for event in told)
    (tmp_path / "server" / "run" / "ledger.jsonl").write_text(written)
    config = Simulation(model="m", data="d", output=tmp_path, clients=2, train={"max_steps": 6})
    folder = Folder(config, tmp_path, "m", ("client-01", "client-02"), (5, 7), True)
    first = client(1, Stepped(2, 10, 0.5, 1), Ended(2, 5.0, 4.0))
    summary = summary_of(config, folder, [first, client(2, Ended(6, None, 3.0))], 1.5)
    assert (summary.rounds, summary.held_out_loss_before, summary.held_out_loss) == (2, 5.0, 3.5)
    assert drawn(summary_table(summary))[1:] == [
        "client-01 5 2 1 1 1 1.00 4.0000",
        "client-02 7 0 2 0 0 2.00 3.0000",
    ]
