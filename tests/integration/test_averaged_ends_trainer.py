"""SplitTrainer averages its member's ends by itself, and goes on from a checkpoint with all they were."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Lock
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from splitlearn import AutoSplitModelForCausalLM, CohortSettings, ShareSettings, SplitTrainer, TrunkServer
from splitlearn.errors import CheckpointError
from splitlearn.model.lora import ADAPTER
from splitlearn.testing import lively_model
from splitlearn.training.batches import PaddedBatch

pytestmark = pytest.mark.timeout(240)

WAIT_S = 120
SHARE = ShareSettings("fedex", every=2, proximal=0.01)
LORA = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear")
READING = Lock()
Weights = dict[str, torch.Tensor]


class Together(TrainerCallback):
    """Nobody begins before both have joined: who is not there is not waited for."""

    def __init__(self, barrier: Barrier) -> None:
        self._barrier = barrier

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._barrier.wait(WAIT_S)


class OneAtATime(SplitTrainer):
    """What torch may unpickle is a setting of the whole process while a trainer reads its random state."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with READING:
            super()._load_rng_state(checkpoint)


def examples(member: int) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(member)
    rows = [torch.randint(3, 128, (8 + 4 * member,), generator=draw).tolist() for _ in range(12)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trained(
    folder: Path, address: str, output: Path, steps: int, *, resume: bool = False
) -> list[tuple[Weights, Weights, list[dict[str, float]]]]:
    """Each member's bases, its modules with their adapters, and its log."""
    barrier = Barrier(2)

    def train(number: int) -> tuple[Weights, Weights, list[dict[str, float]]]:
        split = AutoSplitModelForCausalLM.from_pretrained(
            folder,
            trunk=address,
            dtype="float32",
            lora=LORA,
            run="notes",
            cohort=CohortSettings("sync", members=2),
            share=SHARE,
            member=f"m{number}",
            member_key=output.parent / f"key{number}",
        )
        arguments = TrainingArguments(
            str(output / str(number)),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=2e-2,
            lr_scheduler_type="constant",
            save_steps=3,
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        trainer = OneAtATime(
            model=split,
            args=arguments,
            train_dataset=examples(number),
            data_collator=PaddedBatch(0),
            callbacks=[Together(barrier)],
        )
        try:
            trainer.train(resume_from_checkpoint=resume or None)
            return *weights_of(split), trainer.state.log_history
        finally:
            barrier.abort()
            split.close()

    with ThreadPoolExecutor(2) as threads:
        return [each.result(WAIT_S) for each in [threads.submit(train, number) for number in range(2)]]


def weights_of(split: PreTrainedModel) -> tuple[Weights, Weights]:
    layers = {name: each for name, each in split.named_modules() if isinstance(each, LoraLayer)}
    bases = {name: each.get_base_layer().weight.detach().clone() for name, each in layers.items()}
    return bases, {name: bases[name] + each.get_delta_weight(ADAPTER) for name, each in layers.items()}


def apart(ours: Weights, theirs: Weights) -> float:
    away = torch.cat([(ours[name] - each).flatten() for name, each in theirs.items()])
    return float(away.norm() / torch.cat([each.flatten() for each in theirs.values()]).norm())


def server(folder: Path, state_dir: Path) -> TrunkServer:
    return TrunkServer(
        folder,
        port=0,
        device="cpu",
        dtype="float32",
        state_dir=state_dir,
        drain_s=0.1,
        sessions={"session_tokens": 64, "kv_budget_bytes": 1 << 20},
    )


def test_a_training_that_is_resumed_averages_what_one_that_was_not_interrupted_does(tmp_path):
    folder = lively_model("llama", tmp_path / "model")
    with server(folder, tmp_path / "state1") as running:
        whole = trained(folder, running.address, tmp_path / "whole" / "out", steps=6)
    with server(folder, tmp_path / "state2") as running:
        half = trained(folder, running.address, tmp_path / "parts" / "out", steps=3)
    # Between two averages, and the server is another one.
    with server(folder, tmp_path / "state2") as running:
        found = trained(folder, running.address, tmp_path / "parts" / "out", steps=6, resume=True)
        checkpoint = tmp_path / "parts" / "out" / "0" / "checkpoint-6"
        (checkpoint / "average.safetensors").unlink()
        with pytest.raises(CheckpointError, match="is torn, gone"):
            _resumed_from(folder, running.address, tmp_path / "parts" / "key0", checkpoint)
    (bases, ends, log), (_, others, _) = found
    assert apart(ends, others) <= 1e-6
    assert apart(ends, whole[0][1]) <= 1e-5
    assert apart(half[0][1], whole[0][1]) > 1e-3
    assert apart(bases, whole[0][0]) <= 1e-5
    assert apart(bases, half[0][0]) > 1e-6, "no average added anything to the bases"
    told = [each for each in log if "aggregation_residual" in each]
    assert [each["averages"] for each in told if "loss" in each][-3:] == [2.0, 2.0, 3.0]
    assert all(each["aggregation_residual"] <= 1e-5 for each in told)


def _resumed_from(folder: Path, address: str, key: Path, checkpoint: Path) -> None:
    split = AutoSplitModelForCausalLM.from_pretrained(
        folder,
        trunk=address,
        dtype="float32",
        lora=LORA,
        run="notes",
        cohort=CohortSettings("sync", members=2),
        share=SHARE,
        member="m0",
        member_key=key,
    )
    arguments = TrainingArguments(str(checkpoint.parent), max_steps=6, use_cpu=True, report_to=[])
    trainer = SplitTrainer(
        model=split, args=arguments, train_dataset=examples(0), data_collator=PaddedBatch(0)
    )
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    finally:
        split.close()
