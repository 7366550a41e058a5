"""`splitlearn simulate`: a server and many clients on this machine, stragglers and kills included."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from splitlearn.cli.simulation.config import Simulation

EXAMPLE = Path(__file__).with_name("simulation") / "example.yaml"


def simulate(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="What is simulated.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write, in place of the file's.")] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Print a CONFIG.yaml to begin with, and do nothing else.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="What stands in summary.json, in place of the table.")
    ] = False,
) -> None:
    """A server and many clients on this machine: stragglers, kills and late joiners included.

    Each client is a process of its own that trains as `splitlearn train --cohort` does.
    """
    if example:
        print(EXAMPLE.read_text(encoding="utf-8"), end="")
        return
    if config is None:
        raise typer.BadParameter("name a CONFIG.yaml; `splitlearn simulate --example` prints one")

    from splitlearn.cli.simulation.config_file import read_simulation

    asked = read_simulation(config)
    _run(asked if output is None else asked.model_copy(update={"output": output}), as_json)


def _run(config: Simulation, as_json: bool) -> None:
    from rich.console import Console

    from splitlearn.cli.simulation.simulation import simulate
    from splitlearn.cli.simulation.table import shown, summary_table

    console = Console(highlight=False, stderr=True)
    _tell_of_curves(config)
    with shown(console) as show:
        summary = simulate(config, show)
    if as_json:
        print((config.output / "summary.json").read_text(), end="")
        return
    Console(highlight=False).print(summary_table(summary))
    if summary.held_out_loss is not None and summary.held_out_loss_before is not None:
        print(f"held-out loss {summary.held_out_loss_before:.4f} -> {summary.held_out_loss:.4f}")
    print(f"{config.output}: {summary.rounds} rounds of {summary.rule} in {summary.seconds:.0f} s")


def _tell_of_curves(config: Simulation) -> None:
    from splitlearn.cli.train_arguments import has_tensorboard

    if config.train.tensorboard is not False and not has_tensorboard(config.train.tensorboard):
        print(
            "TensorBoard is not installed, so there are no curves: pip install tensorboard", file=sys.stderr
        )
