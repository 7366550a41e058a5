"""What the trunk's run is opened with, as the trainer's arguments say it."""

from __future__ import annotations

from dataclasses import replace

from transformers import TrainingArguments

from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.client.training import plan_run
from splitlearn.vocabulary import SERVER_OPTIMIZERS, OptimizerSettings


def plan_by_arguments(trunk: RemoteTrunk, args: TrainingArguments) -> None:
    """Tell the run, before it opens, what the arguments say.

    They know no server's optimizer: one that was planned before stays, at their learning rate.

    Raises:
        UnsupportedCall, SettingError: as `plan_run`.
    """
    plan_run(trunk, _optimizer(trunk, args), args.gradient_accumulation_steps, autocast_of(args))


def _optimizer(trunk: RemoteTrunk, args: TrainingArguments) -> OptimizerSettings:
    planned = None if trunk.planned is None else trunk.planned.settings.optimizer
    if planned is not None and planned.name in SERVER_OPTIMIZERS:
        return replace(planned, learning_rate=args.learning_rate)
    return OptimizerSettings(
        name=str(getattr(args.optim, "value", args.optim)),
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        beta1=args.adam_beta1,
        beta2=args.adam_beta2,
        epsilon=args.adam_epsilon,
    )


def autocast_of(args: TrainingArguments) -> str:
    """What matrix products run in; empty for what the weights are in."""
    if args.fp16:
        return "float16"
    return "bfloat16" if args.bf16 else ""
