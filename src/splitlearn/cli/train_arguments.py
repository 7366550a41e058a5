"""The settings of `splitlearn train`, as PEFT and the library's trainer take them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import TrainingArguments

from splitlearn.cli.train_settings import TrainSettings
from splitlearn.errors import SettingError
from splitlearn.training.precision import auto_precision, sides_of
from splitlearn.vocabulary import TapeSettings


def lora_of(settings: TrainSettings) -> LoraConfig | Path:
    """PEFT's configuration, or the folder of the adapter to go on from."""
    if settings.start_from is not None:
        return settings.start_from
    targets = settings.target_modules
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_r,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )


def loading_of(settings: TrainSettings) -> dict[str, Any]:
    """What `from_pretrained` is told of the training."""
    return {
        "lora": lora_of(settings),
        "run": settings.run,
        "freeze": settings.freeze,
        "full": settings.full,
        "seed": settings.seed,
        "tape": tape_of(settings),
    }


def tape_of(settings: TrainSettings) -> TapeSettings:
    return TapeSettings(settings.tape == "recompute", settings.tape_checkpoint_every)


def arguments(settings: TrainSettings, precision: str, *, on_cpu: bool) -> TrainingArguments:
    """The settings as the library's trainer takes them.

    Raises:
        SettingError: TensorBoard is wanted and not installed.
    """
    schedule = settings.schedule
    return TrainingArguments(
        output_dir=str(settings.output),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if schedule == "constant" else schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        seed=settings.seed,
        save_steps=settings.save_steps,
        save_total_limit=settings.keep,
        logging_steps=settings.log_steps,
        logging_first_step=True,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps,
        report_to="tensorboard" if has_tensorboard(settings.tensorboard) else "none",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
    )


def precision_of(settings: TrainSettings, model: Any) -> tuple[str, str]:
    """What matrix products run in, and a line that says so where it was not told.

    Raises:
        SettingError: it cannot be had here.
    """
    if settings.precision == "auto":
        here, trunk = sides_of(model)
        chosen = auto_precision(here, trunk)
        return chosen, f"precision {chosen}: here {here}; the trunk has {trunk}"
    if settings.precision == "float16" and model.device.type == "cpu":
        raise SettingError(
            "--precision float16 needs its loss scaled, which is there on GPUs alone: take bfloat16"
        )
    return settings.precision, ""


def has_tensorboard(wanted: bool | None) -> bool:
    is_there = importlib.util.find_spec("tensorboard") is not None
    if wanted and not is_there:
        raise SettingError("TensorBoard is not installed: `pip install tensorboard`, or --no-tensorboard")
    return is_there if wanted is None else wanted
