"""The library's own Trainer, whose optimizer steps reach the trunk."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from splitlearn.client.ends import OwnEnds
from splitlearn.client.parts import parts_of, trunk_of
from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.client.training import clip_grad_norm
from splitlearn.config import AnomalyConfig
from splitlearn.errors import CheckpointError, RunLost, RunTakenOver, SettingError
from splitlearn.training.anomaly import AnomalyWatch, Verdict
from splitlearn.training.checkpoint import (
    NOTE,
    complete,
    note_of,
    put_weights,
    read_weights,
    require_as_written,
    save_weights,
    whole_checkpoints,
)
from splitlearn.training.part_rates import PartRates
from splitlearn.training.resume import common_checkpoints, skip
from splitlearn.training.run_plan import plan_by_arguments
from splitlearn.training.split_metrics import SplitMetrics
from splitlearn.training.step_underway import StepUnderway

UNCLIPPED = float("inf")
log = logging.getLogger("splitlearn")


class SplitTrainerMixin:
    """Put before a trainer of transformers or TRL: `class MyTrainer(SplitTrainerMixin, SFTTrainer)`.

    Everything else stays the library's: data, schedule, logging, evaluation, callbacks, accumulation.
    What is added: gradients are clipped by the norm of the whole model, each optimizer step is the
    trunk's, too, and one that is skipped because numbers overflowed is skipped on both sides. Logs also
    tell what crossed the wire.

    Args:
        learning_rates: other rates than the arguments' one for "bottom", "trunk" or "top"; the schedule is
            the same for all.
        anomalies: what to do about gradients that are no numbers, or whose norm leaps or vanishes; by
            default a step whose gradients are no numbers is skipped.
        args, kwargs: the trainer's own.
    """

    model: Any
    args: Any

    def __init__(
        self,
        *args: Any,
        learning_rates: Mapping[str, float] | None = None,
        anomalies: AnomalyConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1:
            raise SettingError("a split model is trained by one process: each would train a trunk of its own")
        self._trunk: RemoteTrunk = trunk_of(self.model)
        if self._trunk.ends is not None and set(learning_rates or ()) & {"bottom", "top"}:
            raise SettingError("a cohort that trains bottom and top has one rate for all: name no others")
        self._part_rates = PartRates(learning_rates, self.args.learning_rate)
        self.anomalies = AnomalyWatch(anomalies or AnomalyConfig())
        self._verdict = Verdict()
        self._rates: list[float] = []
        self._underway = StepUnderway(self.model, self._trunk)
        self._split_metrics = SplitMetrics(self._trunk, self.anomalies)
        plan_by_arguments(self._trunk, self.args)
        self.add_callback(_SkippedSteps(self._trunk))  # type: ignore[attr-defined]
        if self._trunk.own_ends is not None:
            self.add_callback(_Averages(self._trunk.own_ends))  # type: ignore[attr-defined]

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As the library's; a checkpoint is resumed from only if the server has its other half.

        With `True` that is the newest step that is whole on both sides. Where the server loses the run
        on the way, both sides go back to that step and train on.

        Raises:
            CheckpointError: there is no such checkpoint.
            SettingError: without it, the run's name is that of one that has been trained already.
            RunLost: the server lost the run, and there is no checkpoint since the last time.
            RunTakenOver: somebody else has joined or resumed the run.
        """
        if resume_from_checkpoint:
            wanted = common_checkpoints(self._trunk, resume_from_checkpoint, Path(self.args.output_dir))
            folder = self._go_back(wanted, or_older=resume_from_checkpoint is True)
        else:
            folder = None
            self._require_fresh_run()
        self._split_metrics.begin()
        while True:
            try:
                trained: TrainOutput = super().train(folder, *args, **kwargs)  # type: ignore[misc]
                # A cohort's others do not wait for who has done its steps.
                self._trunk.leave()
                return trained
            except RunTakenOver:
                # It is the other's now: to take it back would end both.
                raise
            except RunLost as lost:
                folder = self._roll_back(lost, folder)

    def _roll_back(self, lost: RunLost, resumed: str | None) -> str:
        """The checkpoint to go on from, after the server lost the run and kept what it had saved of it.

        Raises:
            RunLost: there is no checkpoint that both sides have, or none since the last loss.
            RunTakenOver: somebody else has brought the run back before.
        """
        self._trunk.require_own_run()
        try:
            common = common_checkpoints(self._trunk, True, Path(self.args.output_dir))
            # Compared before anything is restored: that would turn away who trains the run now.
            newer = list(takewhile(lambda each: not _is_same(each, resumed), common))
            if not newer:
                raise lost
            folder = self._go_back(newer, or_older=True)
        except (CheckpointError, RunLost):
            raise lost from None
        log.warning("the server lost the run (%s): both sides go back to %s", lost.message, folder)
        return folder

    def _require_fresh_run(self) -> None:
        """Bottom and top begin anew, so the trunk must, too; a cohort's goes on with whoever is there."""
        run = self._trunk.run
        if self._trunk.joined_at_step and not self._trunk.is_shared:
            raise SettingError(
                f"run {run.name} is open on the server and stands at step {run.step}, this side begins anew: "
                "resume with resume_from_checkpoint=True, begin anew on both sides with "
                "model.trunk.start_over(), or take another run name"
            )

    def _go_back(self, common: Sequence[Path], *, or_older: bool) -> str:
        """Make both sides what they were at the newest of these that is whole on both; its folder.

        Raises:
            CheckpointError: none of them is, or the one that was named is torn.
        """
        torn: CheckpointError | None = None
        for folder in common:
            try:
                self._load_from_checkpoint(str(folder))
            except CheckpointError as error:
                if or_older:
                    skip(folder, error.message)
                torn = torn or error
            else:
                return str(folder)
        assert torn is not None, "there is a common checkpoint, or the list of them raises"
        raise torn

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Both halves under one step; older ones go once both sides have this one."""
        output_dir = Path(self._get_output_dir(trial=trial))  # type: ignore[attr-defined]
        checkpoint = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"  # type: ignore[attr-defined]
        # First, and before the folder is touched: it may be somebody else's who trains the run now.
        saved, run = self._trunk.save(), self._trunk.run
        # A folder that is written again is not whole meanwhile.
        (checkpoint / NOTE).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        # A member's steps are not the run's, of which the server has the newest.
        trunk_digest = 0 if self._trunk.is_shared else saved.digest_of(run.step)
        complete(checkpoint, run.name, run.step, trunk_digest)
        rotate_checkpoints(
            output_dir=str(output_dir),
            save_total_limit=limit,
            best_model_checkpoint=self.state.best_model_checkpoint,  # type: ignore[attr-defined]
            use_mtime=True,
        )
        kept = [note.step for _, note in whole_checkpoints(output_dir) if note.run == run.name]
        self._trunk.acknowledge(*kept)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        save_weights(self.model, folder)
        if self._trunk.own_ends is not None:
            self._trunk.own_ends.save(folder)
        if self.processing_class is not None:  # type: ignore[attr-defined]
            self.processing_class.save_pretrained(folder)  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        note = note_of(folder)
        if note is None:
            raise CheckpointError(f"{folder} is not whole: resume from another checkpoint")
        require_as_written(folder, note)
        weights = read_weights(self.model, folder)
        self._trunk.restore(note.run, note.step, note.trunk)
        put_weights(self.model, weights)
        # What a cohort trains together is the run's, whatever this side had.
        self._trunk.refresh_ends(anew=True)
        if self._trunk.own_ends is not None:
            self._trunk.own_ends.load(folder)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)  # type: ignore[attr-defined]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        # The second time it is wrapped by accelerate.
        torchs = getattr(optimizer, "optimizer", optimizer)
        if not hasattr(torchs, "steps_trunk"):
            groups = self._part_rates.groups_by_part(torchs.param_groups, self.model, self._trunk)
            torchs.param_groups[:] = list(groups)
            torchs.register_step_pre_hook(self._step_trunk)
            torchs.register_step_post_hook(self._restore_rate)
            vars(torchs)["steps_trunk"] = True
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        scaler = self.accelerator.scaler  # type: ignore[attr-defined]
        self._trunk.run.loss_scale = scaler.get_scale() if scaler is not None else 1.0
        plain = super().training_step  # type: ignore[misc]
        if not self._trunk.is_shared:
            loss: Tensor = plain(*args, **kwargs)
            return loss
        return self._underway.train(plain, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = logs | self._split_metrics.now()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _step_trunk(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before the client's own step: if the trunk cannot, nothing has moved."""
        # A fused optimizer is called in any case, and told whether it may move.
        overflowed = getattr(optimizer, "found_inf", None)
        if self._verdict.skip or (overflowed is not None and bool(overflowed)):
            self._trunk.skip_step()
            self._underway.forget()
            return
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= self._verdict.rate
        rate = self._part_rates.of_trunk(optimizer.param_groups)
        if not self._trunk.is_shared:
            self._trunk.step(learning_rate=rate)
        elif not self._underway.give(rate, lambda: self._clip_own(self.args.max_grad_norm)):
            # Dropped there, so dropped here: without gradients the client's optimizer leaves all as it is.
            self.model.zero_grad(set_to_none=True)
        elif self._trunk.own_ends is not None:
            self._trunk.own_ends.pull()

    def _restore_rate(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """The schedule knows nothing of steps that were made smaller."""
        for group, rate in zip(optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self._clip(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        return self._clip(model, UNCLIPPED) if grad_norm is None else grad_norm

    def _clip(self, model: nn.Module, max_norm: float) -> Tensor:
        accelerator = self.accelerator  # type: ignore[attr-defined]
        self._verdict = Verdict()
        trunk_norms = (
            self._underway.retrying(self._trunk.grad_norms)
            if self._trunk.is_shared
            else self._trunk.grad_norms()
        )
        if accelerator.scaler is not None:
            if not trunk_norms.isfinite().all():
                # The scaler looks at gradients here alone: let it see that the trunk's overflowed.
                _spoil(model, self._trunk)
            accelerator.unscale_gradients()
        norm = clip_grad_norm(model, max_norm, trunk_norms)
        if accelerator.scaler is None or bool(torch.isfinite(norm)):
            # Overflows are the scaler's everyday business.
            self._judge(float(norm))
        return norm

    def _clip_own(self, max_norm: float) -> None:
        """Of a step that was computed again: a norm that is 0 does not clip."""
        if max_norm:
            clip_grad_norm(self.model, max_norm)

    def _judge(self, norm: float) -> None:
        self._verdict = self.anomalies.judge(norm, self.state.global_step)  # type: ignore[attr-defined]
        if self._verdict.skip:
            # Without gradients the client's optimizer leaves everything as it is.
            self.model.zero_grad(set_to_none=True)
        if self._verdict.stop:
            self.control.should_save = self.control.should_training_stop = True  # type: ignore[attr-defined]


class SplitTrainer(SplitTrainerMixin, Trainer):
    """transformers' Trainer for a split model; takes the same arguments."""


class _SkippedSteps(TrainerCallback):
    """Where the client's optimizer was skipped, the trunk's gradients go, too."""

    def __init__(self, trunk: RemoteTrunk) -> None:
        self._trunk = trunk

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self._trunk.run.unapplied:
            self._trunk.skip_step()


class _Averages(TrainerCallback):
    """Bottom and top become the cohort's average as soon as that is due."""

    def __init__(self, ends: OwnEnds) -> None:
        self._ends = ends

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        # Whoever comes late, or back, has what the others have; they may be waiting for it.
        self._ends.average()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._ends.average()


def _is_same(folder: Path, resumed: str | None) -> bool:
    return resumed is not None and folder.resolve() == Path(resumed).resolve()


def _spoil(model: nn.Module, trunk: RemoteTrunk) -> None:
    for _, parameter in parts_of(model, trunk):
        if parameter.grad is not None:
            parameter.grad.fill_(UNCLIPPED)
            return
