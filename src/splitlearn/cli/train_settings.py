"""What `splitlearn train` is told beside model and server; its options and its YAML file have these names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from splitlearn.config import AnomalyConfig, Settings
from splitlearn.errors import SettingError

PrecisionName = Literal["auto", "float32", "bfloat16", "float16"]


class TrainSettings(Settings):
    """Which texts, which adapter, how it is trained, and what is written."""

    data: list[Path]
    """A .jsonl file (a line has `text`, or `prompt` and `completion`, or `messages`) or a .txt file; repeat
    the option for more."""
    output: Path
    """Folder for checkpoints and, at the end, the adapter."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder whose other half the server has."""
    max_tokens: Annotated[int, Field(ge=2)] = 1024
    """Tokens of an example, or of a packed row; what is longer is cut."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the examples that is not learned: the loss on it is measured before and after."""
    pack: bool | None = None
    """Several examples in a row, none of which sees another; by default where the model can."""

    lora_r: PositiveInt = 8
    """Rank of the adapter."""
    lora_alpha: Annotated[float | None, Field(gt=0)] = None
    """What the adapter is scaled by, over its rank; by default twice the rank."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that is left out in training."""
    target_modules: list[str] = Field(default=["all-linear"])
    """Names of the layers that get an adapter, for example `q_proj`; repeat the option for more."""
    start_from: Path | None = None
    """Folder of a PEFT adapter to go on from, in place of the four settings before."""
    freeze: list[str] = Field(default=[])
    """A part that is not trained, `bottom`, `trunk` or `top`; repeat the option for two."""
    full: list[str] = Field(default=[])
    """A part that is trained in all its weights, in place of an adapter, `bottom` or `top`; repeat the option
    for both."""

    epochs: PositiveFloat = 3.0
    """How often each example is learned."""
    max_steps: Annotated[int | None, Field(gt=0)] = None
    """Optimizer steps, in place of epochs."""
    batch_size: PositiveInt = 1
    """Rows at once: more is faster and takes more memory, on both sides."""
    accumulation: PositiveInt = 8
    """Batches that make one optimizer step."""
    learning_rate: PositiveFloat = 2e-4
    """The highest one, after the warm-up."""
    learning_rate_bottom: Annotated[float | None, Field(gt=0)] = None
    """The bottom's own, under the same schedule."""
    learning_rate_trunk: Annotated[float | None, Field(gt=0)] = None
    """The trunk's own, under the same schedule."""
    learning_rate_top: Annotated[float | None, Field(gt=0)] = None
    """The top's own, under the same schedule."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's, on the adapter's weights."""
    clip: NonNegativeFloat = 1.0
    """The norm that the whole model's gradient may have; 0 does not clip."""
    precision: PrecisionName = "auto"
    """What both sides multiply matrices in; "auto" is bfloat16 where both devices have it (or the weights are
    in it), else float16 where both are CUDA devices, else float32."""
    seed: NonNegativeInt = 0
    """Of the adapter's first weights, dropout, the order of the examples and what is held out."""

    tape: Literal["keep", "recompute"] = "keep"
    """What the trunk keeps of a forward until its gradient comes: all, or its input, to run it again."""
    tape_checkpoint_every: NonNegativeInt = 0
    """Of every n-th trunk layer the inner results are computed again instead of kept; 0 keeps all."""
    anomaly: AnomalyConfig = AnomalyConfig()
    """What is done about gradients that are not what gradients should be."""

    run: str | None = None
    """Name of the training on the server; by default one of its own."""
    save_steps: PositiveInt = 100
    """Steps between checkpoints; the last step has one, too."""
    keep: PositiveInt = 2
    """Checkpoints that are kept; older ones go, on both sides."""
    log_steps: PositiveInt = 10
    """Steps between lines that tell the loss."""
    eval_steps: Annotated[int | None, Field(gt=0)] = None
    """Steps between measurements of the held-out loss; by default before and after alone."""
    tensorboard: bool | None = None
    """Write curves for TensorBoard; by default if it is installed."""

    @property
    def learning_rates(self) -> dict[str, float]:
        """Of the parts that have one of their own."""
        told = {part: getattr(self, f"learning_rate_{part}") for part in ("bottom", "trunk", "top")}
        return {part: rate for part, rate in told.items() if rate is not None}

    def require_consistent(self) -> None:
        """Raises SettingError for settings that leave each other without effect."""
        if self.eval_steps and not self.held_out:
            raise SettingError("--eval-steps has nothing to measure while --held-out is 0: raise it")
        if self.start_from is not None:
            for name in ("lora_r", "lora_alpha", "lora_dropout", "target_modules"):
                if getattr(self, name) != TrainSettings.model_fields[name].default:
                    flag = name.replace("_", "-")
                    raise SettingError(
                        f"--{flag} has no effect with --start-from, whose adapter has its own: leave one out"
                    )
