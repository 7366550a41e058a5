"""`splitlearn export`: what was trained, as others load it: a PEFT folder, or a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitlearn.cli.sizes import show_bytes


def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The output of `splitlearn train`, or a PEFT adapter.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model with the adapter added to its weights.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the whole model.", show_default="the adapter's own base"),
    ] = None,
) -> None:
    """The adapter that was trained as one PEFT folder, or merged into the model.

    Either is checked first: it has each weight that this adapter has on this model, and no other.
    """
    from splitlearn.cli.adapter_export import Adapter
    from splitlearn.cli.new_folder import new_folder

    adapter = Adapter.find(folder, model)
    adapter.require_fitting()
    with new_folder(output) as growing:
        adapter.merge_into(growing) if merge else adapter.copy_into(growing)
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    what = f"{adapter.model} with the adapter merged in" if merge else f"an adapter for {adapter.model}"
    print(f"{output}: {what}, {show_bytes(size)}")
