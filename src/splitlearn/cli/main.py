"""The `splitlearn` command: what is true of every verb."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from splitlearn import __version__
from splitlearn.cli.ending import TERMINATED, WRONG_USE
from splitlearn.cli.verbs import Verbs

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "GRPC_VERBOSITY": "NONE",
    "HF_HUB_VERBOSITY": "error",
}
"""So that what goes wrong is one line of ours; a variable that is set already stays as it is."""

app = typer.Typer(name="splitlearn", cls=Verbs, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def splitlearn(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """Run a causal LM on somebody else's GPU, while the text and the tokens stay here."""
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(WRONG_USE)


def main() -> NoReturn:
    """Run one command and end the process with its exit code."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, _terminated)
    app(prog_name="splitlearn")
    sys.exit()


def _terminated(number: int, frame: object) -> NoReturn:
    """As an exception, so that a command's own processes end with it."""
    sys.exit(TERMINATED)
