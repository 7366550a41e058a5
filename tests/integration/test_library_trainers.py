"""What comes with the library's trainers comes with the split ones: TRL, TensorBoard, early stopping."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoTokenizer, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from splitlearn import AutoSplitModelForCausalLM, SplitTrainer, SplitTrainerMixin, TrunkServer
from splitlearn.model.lora import ADAPTER, add_lora, settings_of, weights_of
from splitlearn.testing.tiny import tiny_whole

SEED = 7
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
IDS = torch.randint(4, 100, (40, 12), generator=torch.Generator().manual_seed(1))
DATA = [{"input_ids": row, "labels": row} for row in IDS]
HOW = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
}


@pytest.fixture
def server(model_folder: Path, tmp_path: Path) -> Iterator[TrunkServer]:
    sessions = {"session_tokens": 64, "kv_budget_bytes": 1 << 24}
    with TrunkServer(
        model_folder, port=0, device="cpu", sessions=sessions, state_dir=tmp_path / "state"
    ) as server:
        yield server


@pytest.fixture
def split(model_folder: Path, server: TrunkServer) -> Iterator[Any]:
    with closing(load(model_folder, server)) as model:
        yield model


def load(folder: Path, server: TrunkServer) -> Any:
    return AutoSplitModelForCausalLM.from_pretrained(
        folder, trunk=server.address, lora=LoraConfig(**LORA), seed=SEED
    )


@pytest.fixture
def whole(model_folder: Path) -> Any:
    model = tiny_whole(model_folder)
    add_lora(model, settings_of(LoraConfig(**LORA), model.config.model_type), ADAPTER, SEED)
    return model


def told(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---------------------------------------------------------------- TRL


class SplitSFTTrainer(SplitTrainerMixin, SFTTrainer):
    """TRL's trainer over the wire."""


def with_trl(kind: type, model: Any, folder: Path, output: Path, packed: bool, **how: Any) -> Any:
    config = SFTConfig(
        str(output),
        **HOW,
        max_steps=6,
        gradient_accumulation_steps=2,
        bf16=False,
        max_length=32,
        packing=packed,
        packing_strategy="wrapped",
    )
    lines = [{"prompt": f"{n}?", "completion": f" The answer is {n * n}."} for n in range(24)]
    trainer = kind(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(lines),
        processing_class=AutoTokenizer.from_pretrained(folder),
        **how,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("packed", [False, True], ids=["a row each", "packed"])
def test_trls_trainer_gives_the_whole_models_weights_bit_for_bit(
    split, whole, model_folder, tmp_path, packed
) -> None:
    theirs = with_trl(SFTTrainer, whole, model_folder, tmp_path / "a", packed)
    ours = with_trl(SplitSFTTrainer, split, model_folder, tmp_path / "b", packed)
    for key in ("loss", "grad_norm", "mean_token_accuracy", "entropy"):
        assert told(ours, key) == told(theirs, key) != []
    assert same(split.adapter_weights(), weights_of(whole, ADAPTER))


def test_with_another_rate_for_the_trunk_trls_weights_are_others(
    split, whole, model_folder, tmp_path
) -> None:
    """The control of the equality above."""
    with_trl(SFTTrainer, whole, model_folder, tmp_path / "a", packed=False)
    rates = {"trunk": 1.1e-2}
    with_trl(SplitSFTTrainer, split, model_folder, tmp_path / "b", packed=False, learning_rates=rates)
    ours, theirs = split.adapter_weights(), weights_of(whole, ADAPTER)
    assert {name for name in theirs if torch.equal(ours[name], theirs[name])} == set()


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_has_the_loss_and_what_crossed_the_wire(split, tmp_path, monkeypatch) -> None:
    curves = tmp_path / "curves"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(curves))
    args = TrainingArguments(
        str(tmp_path / "out"),
        **(HOW | {"report_to": "tensorboard"}),
        max_steps=3,
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer = SplitTrainer(split, args, train_dataset=DATA, eval_dataset=DATA[:4])
    traffic = split.trunk.transport.traffic
    before = trainer.evaluate()["eval_loss"]  # what that sends is not the first step's
    trainer.train()
    events = EventAccumulator(str(curves)).Reload()

    def curve(name: str) -> list[float]:
        return [event.value for event in events.Scalars(name)]

    assert curve("train/loss") == pytest.approx(told(trainer, "loss"))
    assert curve("eval/loss") == pytest.approx([before, *told(trainer, "eval_loss")])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    # Of a batch of 2 x 12 tokens both cuts' float32 activations and gradients cross, two each way.
    crossing = 2 * 12 * split.config.hidden_size * 4 / 1e6
    for name in ("train/wire_sent_mb", "train/wire_received_mb"):
        assert all(2 * crossing < mb < 2 * crossing + 0.001 for mb in curve(name))
    assert sum(curve("train/wire_sent_mb") + curve("train/wire_received_mb")) * 1e6 < traffic.message_bytes
    assert curve("train/forwarded_again") == curve("train/anomalies") == [0.0] * 3


# ---------------------------------------------------------------- early stopping


class Remember(TrainerCallback):
    """The whole adapter as it was after each step."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after[state.global_step] = {name: each.clone() for name, each in self.weights().items()}


def stopped_early(kind: type, model: Any, weights: Any, output: Path) -> tuple[Any, Remember]:
    """A rate that soon spoils what other texts are measured by."""
    how = {"learning_rate": 5e-2, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    args = TrainingArguments(
        str(output),
        **(HOW | how),
        max_steps=40,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    remember = Remember(weights)
    callbacks = [EarlyStoppingCallback(early_stopping_patience=2), remember]
    trainer = kind(model, args, train_dataset=DATA[:10], eval_dataset=DATA[10:], callbacks=callbacks)
    trainer.train()
    return trainer, remember


def test_early_stopping_ends_with_the_best_weights_on_both_sides(split, whole, server, tmp_path) -> None:
    ours, seen = stopped_early(SplitTrainer, split, split.adapter_weights, tmp_path / "b")
    theirs, _ = stopped_early(Trainer, whole, lambda: weights_of(whole, ADAPTER), tmp_path / "a")
    best, stopped = ours.state.best_global_step, ours.state.global_step
    assert best < stopped < 40
    assert told(ours, "eval_loss") == told(theirs, "eval_loss")
    assert (best, stopped) == (theirs.state.best_global_step, theirs.state.global_step)
    assert split.trunk.run.step == best
    assert same(split.adapter_weights(), seen.after[best])
    assert not same(split.adapter_weights(), seen.after[stopped])
    assert same(split.adapter_weights(), weights_of(whole, ADAPTER))
    assert ours.evaluate()["eval_loss"] == min(told(ours, "eval_loss"))
