"""`splitlearn train`: fine-tune with LoRA over the wire, with checkpoints and a held-out loss."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from splitlearn.cli.cohort_options import KEY_FILE, CohortFigures, MemberOptions
from splitlearn.cli.config_file import take_config, write_config
from splitlearn.cli.options import (
    AcceptLabelLeak,
    Codec,
    Model,
    OwnBottomLayers,
    OwnDevice,
    OwnDType,
    OwnTopLayers,
    Trunk,
    grouped,
    with_options_of,
)
from splitlearn.cli.train_settings import TrainSettings
from splitlearn.errors import SettingError
from splitlearn.vocabulary import CohortSettings

ASKED = "train.yaml"


@with_options_of(CohortFigures)
@with_options_of(MemberOptions)
@with_options_of(TrainSettings)
def train(
    context: typer.Context,
    model: Model,
    trunk: Trunk,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=take_config,
            is_eager=True,
            metavar="FILE.yaml",
            help="Settings by their options' names; what the command line says goes before.",
        ),
    ] = None,
    bottom_layers: OwnBottomLayers = None,
    top_layers: OwnTopLayers = None,
    accept_label_leak: AcceptLabelLeak = False,
    dtype: OwnDType = "auto",
    codec: Codec = "raw",
    device: OwnDevice = "cpu",
    **told: Any,
) -> None:
    """Fine-tune with LoRA; texts and labels stay here.

    Bottom and top are trained here, the trunk on the server. The output folder gets checkpoints, train.yaml
    (what was asked, as --config takes it) and, at the end, the whole model's adapter in PEFT's format.
    With --cohort several trainings with data of their own train one trunk together.
    """
    settings, options = _settings(told)
    cohort = _cohort(settings, options, told)

    from splitlearn.cli.fine_tuning import (
        ADAPTER,
        FineTuning,
        learnable,
        require_new,
        require_same_run,
    )
    from splitlearn.cli.train_arguments import loading_of
    from splitlearn.client.split_model import AutoSplitModelForCausalLM

    if settings.resume:
        require_same_run(settings)
    else:
        require_new(settings.output)
    data = learnable(model, settings)
    client = AutoSplitModelForCausalLM.from_pretrained(
        model,
        trunk=trunk,
        bottom_layers=bottom_layers,
        top_layers=top_layers,
        accept_label_leak=accept_label_leak,
        dtype=dtype,
        codec=codec,
        device=device,
        **loading_of(settings),
        cohort=cohort,
        member=options.member,
        member_key=None if cohort is None else options.member_key or settings.output / KEY_FILE,
    )
    with closing(client):
        tuning = FineTuning(client, data, settings)
        if not settings.resume:
            if cohort is None:
                tuning.require_new_run()
            # What "auto" was, so that a resumed training does not choose again, perhaps elsewhere.
            decided = {"precision": tuning.precision}
            write_config(context, settings.output / ASKED, leave_out={"config", "resume"}, decided=decided)
        done = tuning.run()
        # Its checkpoints stay: the server's memory is for runs that are trained.
        client.trunk.close_run()
    if done.held_out_loss_before is not None and done.held_out_loss_after is not None:
        print(f"held-out loss {done.held_out_loss_before:.4f} -> {done.held_out_loss_after:.4f}")
    print(f"{settings.output / ADAPTER}: the adapter after {done.steps} steps of run {done.run}")


def _settings(told: dict[str, Any]) -> tuple[TrainSettings, MemberOptions]:
    """Raises BadParameter for a value out of its range."""
    try:
        settings = TrainSettings(**grouped(TrainSettings, told))
        settings.require_consistent()
        return settings, MemberOptions(**grouped(MemberOptions, told))
    except SettingError as error:
        raise typer.BadParameter(error.message) from None


def _cohort(settings: TrainSettings, options: MemberOptions, told: dict[str, Any]) -> CohortSettings | None:
    """Raises BadParameter where it is not whole."""
    try:
        return options.shared(settings.run, CohortFigures(**grouped(CohortFigures, told)))
    except SettingError as error:
        raise typer.BadParameter(error.message) from None
