"""What the trainer's arguments say of the trunk's optimizer, and what they cannot say."""

from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import TrainingArguments

from splitlearn.client.training import plan_run, prepare_training
from splitlearn.testing import split_over_loopback, tiny_model
from splitlearn.training.run_plan import plan_by_arguments
from splitlearn.vocabulary import OptimizerSettings

PLANNED = OptimizerSettings("fedadam", learning_rate=0.5, beta2=0.99, epsilon=1e-3)


@pytest.mark.parametrize(
    "planned", [PLANNED, OptimizerSettings("sgd", momentum=0.5)], ids=lambda each: each.name
)
def test_a_servers_optimizer_that_was_planned_stays_and_any_other_is_the_arguments(tmp_path: Path, planned):
    args = TrainingArguments(tmp_path / "out", optim="adamw_torch", learning_rate=0.25, adam_epsilon=1e-7)
    with split_over_loopback(tiny_model("llama", tmp_path / "model"), dtype="float32") as split:
        prepare_training(split, LoraConfig(r=2, target_modules="all-linear"), "notes", (), 0)
        plan_run(split.trunk, planned)
        plan_by_arguments(split.trunk, args)
        found = split.trunk.planned.settings.optimizer
        if planned is PLANNED:
            assert found == OptimizerSettings("fedadam", learning_rate=0.25, beta2=0.99, epsilon=1e-3)
        else:
            assert found == OptimizerSettings("adamw_torch", learning_rate=0.25, epsilon=1e-7)
        assert split.trunk.run.settings.optimizer.name == found.name, "and the server has it"
