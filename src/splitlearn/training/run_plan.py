"""What the trunk's run is opened with, as the trainer's arguments say it."""

from __future__ import annotations

from transformers import TrainingArguments

from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.client.training import plan_run
from splitlearn.vocabulary import OptimizerSettings


def plan_by_arguments(trunk: RemoteTrunk, args: TrainingArguments) -> None:
    """Tell the run, before it opens, what the arguments say.

    Raises:
        UnsupportedCall, SettingError: as `plan_run`.
    """
    plan_run(
        trunk,
        OptimizerSettings(
            name=str(getattr(args.optim, "value", args.optim)),
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            beta1=args.adam_beta1,
            beta2=args.adam_beta2,
            epsilon=args.adam_epsilon,
        ),
        accumulation=args.gradient_accumulation_steps,
        autocast=autocast_of(args),
    )


def autocast_of(args: TrainingArguments) -> str:
    """What matrix products run in; empty for what the weights are in."""
    if args.fp16:
        return "float16"
    return "bfloat16" if args.bf16 else ""
