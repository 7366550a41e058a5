"""The verbs of `splitlearn`, each loaded when it is asked for, so that `--help` is there at once."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from splitlearn.cli.ending import one_line_errors

VERBS = {
    "serve": "Hold the trunk of a model; prints `listening on HOST:PORT` when ready.",
    "slice": "Write a folder with one side's tensors only.",
    "generate": "Generate text: to stdout as it is made, timings and bytes to stderr.",
    "chat": "Talk with a model; `/exit` or Ctrl-D ends it.",
    "train": "Fine-tune with LoRA; texts and labels stay here.",
    "export": "The adapter that was trained as one PEFT folder, or merged into the model.",
    "runs": "The trainings that a server holds; `--delete` removes one.",
    "members": "Who trains a run together, and where each of them stands; only members are told.",
    "partition": "Data for the clients of a simulation: one file dealt out, and a picture of who holds what.",
    "simulate": "A server and many clients on this machine: stragglers, kills and late joiners included.",
    "plan": "Layers, memory and bytes of a split, before anything runs.",
    "verify": "Show that split and whole give the same, on your own model.",
    "bench": "Measure a trunk: steps a second under load, texts by several clients at once.",
    "doctor": "Can this machine load, reach and run it?",
    "demo": "All of it on one machine, with a small real model.",
}
"""Each verb's file and function have its name; the function's help begins with this line."""


class Verbs(TyperGroup):
    """Knows the verbs by name, and ends each as its exit code says."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return load_verb(cmd_name) if cmd_name in VERBS else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with one_line_errors(debug=False):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with one_line_errors(debug=ctx.params.get("debug", False)):
            return super().invoke(ctx)


def load_verb(name: str) -> Any:
    """The command of this name, with its options; or with the verbs below it, where it has such."""
    module = import_module(f"splitlearn.cli.{name}")
    verb = typer.Typer(name=name, add_completion=False, rich_markup_mode=None)
    if below := getattr(module, "VERBS", None):
        verb.callback()(getattr(module, name))
        for own_name, function in below.items():
            verb.command(own_name)(function)
    else:
        verb.command(name)(getattr(module, name))
    return typer.main.get_command(verb)
