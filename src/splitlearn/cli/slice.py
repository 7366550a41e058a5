"""`splitlearn slice`: a folder with one side's part of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from splitlearn.cli.options import BOTTOM_LAYERS, TOP_LAYERS, AcceptLabelLeak, BottomLayers, Model, TopLayers
from splitlearn.cli.sizes import show_bytes


def slice(
    model: Model,
    part: Annotated[
        Literal["client", "trunk"], typer.Option(help="Bottom and top, or what is between them.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    bottom_layers: BottomLayers = BOTTOM_LAYERS,
    top_layers: TopLayers = TOP_LAYERS,
    accept_label_leak: AcceptLabelLeak = False,
) -> None:
    """Write a folder with one side's tensors only.

    Its owner need not hold the rest of the model, nor download it.
    """
    from splitlearn.model.checkpoint import Checkpoint
    from splitlearn.model.plan import SplitPlan
    from splitlearn.model.slices import write_slice

    checkpoint = Checkpoint.open(model)
    plan = SplitPlan.for_config(checkpoint.config, bottom_layers, top_layers, accept_label_leak)
    folder = write_slice(checkpoint, plan, part, output)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{folder}: the {part}'s part of {model}, split {plan}, {show_bytes(size)}")
