"""One fine-tuning: examples in, an adapter out, the loss on what was held out before and after."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from splitlearn.cli.text import load_tokenizer
from splitlearn.cli.train_arguments import arguments, precision_of
from splitlearn.cli.train_progress import Bar, Lines, Show, to_stderr
from splitlearn.cli.train_settings import TrainSettings
from splitlearn.errors import CheckpointError, RunLost, SettingError
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.training.checkpoint import whole_checkpoints
from splitlearn.training.data import TrainingData, training_data
from splitlearn.training.evaluation import TokenWeightedEvaluation, held_out_loss
from splitlearn.training.packing import require_packable
from splitlearn.training.trainer import SplitTrainer

ADAPTER, RESULT = "adapter", "result.json"


@dataclass(frozen=True, slots=True)
class FineTuned:
    """What came of it; losses are means over the held-out examples' learned tokens, in nats."""

    run: str
    steps: int = 0
    held_out_loss_before: float | None = None
    held_out_loss_after: float | None = None


class FineTuning:
    """Trains a split model on these examples; what it writes goes to the settings' output folder.

    Args:
        model: loaded with `lora=`.
        show: takes a line for each thing that a reader wants to know.
        has_bar: whether to draw the library's progress bar on stderr.
    """

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        settings: TrainSettings,
        show: Show | None = None,
        has_bar: bool | None = None,
    ) -> None:
        self._model = model
        self._data = data
        self._settings = settings
        self._show = show or to_stderr
        self.precision, self._told_of_precision = precision_of(settings, model)
        # Made before the model is first called: it tells the run what the run is opened with.
        self.trainer = TunedTrainer(
            model=model,
            args=arguments(settings, self.precision, on_cpu=model.device.type == "cpu"),
            train_dataset=data.train,
            eval_dataset=data.held_out or None,
            data_collator=data.collate,
            learning_rates=settings.learning_rates,
            anomalies=settings.anomaly,
        )
        self._show_progress(sys.stderr.isatty() if has_bar is None else has_bar)

    def require_new_run(self) -> None:
        """Raises SettingError where the server has a run of this name already."""
        trunk, name = self._model.trunk, self._settings.run
        if name is None:
            return
        try:
            facts = trunk.transport.run_facts(name)
        except RunLost:
            return
        raise SettingError(
            f"the server has a run {name} already, at step {facts.step}: go on from its checkpoint with "
            f"--resume, take another name, or remove it with `splitlearn runs {trunk.transport.address} "
            f"--delete {name}`"
        )

    def run(
        self, *, measures_before: bool = True, trained_at: Callable[[], None] = lambda: None
    ) -> FineTuned:
        """Train, from the newest common checkpoint where the settings say so, and write the adapter.

        Args:
            measures_before: whether the held-out loss is measured before the first step, too.
            trained_at: is called after the last step, before the loss is measured again.
        """
        result = self._begin(measures_before)
        trained = self.trainer.train(resume_from_checkpoint=self._settings.resume or None)
        trained_at()
        done = FineTuned(
            run=self._model.trunk.run.name,
            steps=trained.global_step,
            held_out_loss_before=result.held_out_loss_before,
            held_out_loss_after=self._held_out_loss("after"),
        )
        self._model.save_adapter(self._settings.output / ADAPTER)
        self._write(done)
        return done

    def _begin(self, measures: bool) -> FineTuned:
        for line in filter(None, (*told_of(self._data), self._told_of_precision)):
            self._show(line)
        if self._settings.resume:
            return read_result(self._settings.output)
        trunk = self._model.trunk
        if trunk.is_shared:
            # A member that was killed before its first checkpoint: what counts of it is not given twice.
            trunk.run.go_on_from(0)
        before = self._held_out_loss("before") if measures else None
        begun = FineTuned(run=self._model.trunk.run.name, held_out_loss_before=before)
        self._write(begun)
        return begun

    def _held_out_loss(self, when: str) -> float | None:
        if not self._data.held_out:
            return None
        with self.trainer.accelerator.autocast():
            loss = held_out_loss(self._model, self.trainer.get_eval_dataloader())
        self._show(f"held-out loss {when}: {loss:.4f}")
        return loss

    def _write(self, result: FineTuned) -> None:
        (self._settings.output / RESULT).write_text(json.dumps(asdict(result)) + "\n")

    def _show_progress(self, has_bar: bool) -> None:
        for printing in (PrinterCallback, ProgressCallback):
            self.trainer.remove_callback(printing)
        self.trainer.add_callback(Bar() if has_bar else Lines(self._show))


class TunedTrainer(TokenWeightedEvaluation, SplitTrainer):
    """Its evaluation weighs each learned token alike, before, during and after."""


def learnable(model: str, settings: TrainSettings) -> TrainingData:
    """The files' examples as this model's tokens, packed where that was asked for or can be.

    Raises:
        DataError, SettingError, CheckpointError: as `training_data`; or the model has no tokenizer.
    """
    config = Checkpoint.open(model).config
    return training_data(
        list(settings.data),
        load_tokenizer(model),
        max_tokens=settings.max_tokens,
        held_out_share=settings.held_out,
        seed=settings.seed,
        pack_for=config if is_packed(settings.pack, config) else None,
    )


def is_packed(wanted: bool | None, config: Any) -> bool:
    if wanted is not None:
        return wanted
    try:
        require_packable(config)
    except SettingError:
        return False
    return True


def told_of(data: TrainingData) -> list[str]:
    """What became of the files, a line each."""
    lines = [
        f"{data.train_examples:,} examples to learn in {len(data.train):,} rows, "
        f"{data.held_out_examples:,} held out"
    ]
    if data.truncated:
        lines.append(f"{data.truncated:,} examples are longer than --max-tokens and are learned up to there")
    if data.dropped:
        lines.append(f"{data.dropped:,} examples are left out: nothing to learn lies within --max-tokens")
    return lines


def require_new(output: Path) -> None:
    """Make the folder; raises SettingError where an earlier training is in it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"{output} cannot be made ({error.strerror}): name another --output") from None
    if any(output.glob("checkpoint-*")) or (output / ADAPTER).exists():
        raise SettingError(
            f"{output} has an earlier training: go on from it with --resume, or name another --output"
        )


def require_same_run(settings: TrainSettings) -> None:
    """Raises where there is nothing to resume, or it is another run's."""
    whole = whole_checkpoints(settings.output)
    if not whole:
        raise CheckpointError(f"{settings.output} has no whole checkpoint: train without --resume")
    run = whole[0][1].run
    if settings.run not in (None, run):
        raise SettingError(f"{settings.output} is of run {run}, not {settings.run}: leave --run out")


def read_result(output: Path) -> FineTuned:
    """What an earlier training of this folder has written down."""
    try:
        return FineTuned(**json.loads((output / RESULT).read_text()))
    except (OSError, ValueError, TypeError):
        return FineTuned(run="")
