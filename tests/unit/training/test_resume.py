"""A training goes on from the newest checkpoint that is whole on both sides, whatever became of the newer."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback, TrainingArguments

from splitlearn import AutoSplitModelForCausalLM, SplitTrainer, TrunkServer
from splitlearn.engine.disk_budget import DiskBudget
from splitlearn.engine.run import Run
from splitlearn.errors import CheckpointError, ResourceExhausted, RunBroken, StepOutOfOrder
from splitlearn.testing.tiny import tiny_model
from splitlearn.training.checkpoint import NOTE, WEIGHTS

WAIT_S, MAX_CHECKPOINTS = 20, 6
IDS = torch.randint(4, 100, (8, 6), generator=torch.Generator().manual_seed(1))
DATA = [{"input_ids": row, "labels": row} for row in IDS]
Loaded = Callable[..., AbstractContextManager[Any]]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrunkServer]:
    folder = tiny_model("llama", tmp_path_factory.mktemp("model"))
    sessions = {"session_tokens": 64, "kv_budget_bytes": 1 << 20}
    state = tmp_path_factory.mktemp("state")
    runs = {"max_checkpoints": MAX_CHECKPOINTS}
    with TrunkServer(folder, port=0, device="cpu", sessions=sessions, runs=runs, state_dir=state) as running:
        yield running


@contextmanager
def load(server: TrunkServer, run: str, **how: Any) -> Iterator[Any]:
    """The model as a client loads it."""
    told = {"lora": LoraConfig(r=2, target_modules=["q_proj"]), "seed": 7} | how
    model = AutoSplitModelForCausalLM.from_pretrained(
        server.config.model, trunk=server.address, run=run, **told
    )
    try:
        yield model
    finally:
        model.close()


@pytest.fixture
def loaded(server: TrunkServer, tmp_path: Path) -> Loaded:
    """In a run of the test's own."""
    return lambda **how: load(server, tmp_path.name, **how)


def trainer(model: Any, output: Path, steps: int, **how: Any) -> SplitTrainer:
    told = {
        "max_steps": steps,
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return SplitTrainer(
        model, TrainingArguments(str(output), **(told | how)), train_dataset=DATA, eval_dataset=DATA[:2]
    )


@pytest.fixture
def output(loaded: Loaded, tmp_path: Path) -> Path:
    """Three steps, each with a checkpoint on both sides."""
    with loaded() as model:
        trainer(model, tmp_path / "out", 3).train()
    return tmp_path / "out"


@pytest.fixture(scope="module")
def undisturbed(server: TrunkServer, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    with load(server, "undisturbed") as model:
        trainer(model, tmp_path_factory.mktemp("undisturbed"), 4, save_strategy="no").train()
        return model.adapter_weights()


def tear(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def on_server(server: TrunkServer, run: str, step: int) -> Path:
    (found,) = server.config.state_dir.glob(f"*/runs/{run}/step-{step:08d}")
    return found


def resume(loaded: Loaded, output: Path, wanted: Any = True) -> tuple[int, Weights]:
    """The step that it went on from, and the adapter at the end."""
    begun: list[int] = []

    class Watched(SplitTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            begun.append(self.state.global_step)
            return super().training_step(*args, **kwargs)

    with loaded() as model:
        how = trainer(model, output, 4).args
        Watched(model, how, train_dataset=DATA).train(resume_from_checkpoint=wanted)
        return begun[0], model.adapter_weights()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "run.json"])
def test_where_the_servers_newest_half_is_torn_the_next_older_one_is_taken(
    server, loaded, output, tmp_path, caplog, undisturbed, file
) -> None:
    tear(on_server(server, tmp_path.name, 3) / file)
    step, weights = resume(loaded, output)
    assert step == 2
    assert all(torch.equal(weights[name], each) for name, each in undisturbed.items())
    (said,) = [each for each in warnings(caplog) if "checkpoint-3" in each]
    assert "skipped" in said
    assert "torn" in said


@pytest.mark.parametrize("file", [WEIGHTS, "optimizer.pt", "trainer_state.json", "rng_state.pth", NOTE])
def test_where_the_clients_newest_half_is_torn_the_next_older_one_is_taken(
    loaded, output, caplog, undisturbed, file
) -> None:
    tear(output / "checkpoint-3" / file)
    step, weights = resume(loaded, output)
    assert step == 2
    assert all(torch.equal(weights[name], each) for name, each in undisturbed.items())
    assert any("checkpoint-3" in each and "skipped" in each for each in warnings(caplog))


def test_both_halves_may_be_torn_at_different_steps(server, loaded, output, tmp_path, caplog) -> None:
    tear(output / "checkpoint-3" / WEIGHTS)
    tear(on_server(server, tmp_path.name, 2) / "adapter.safetensors")
    assert resume(loaded, output)[0] == 1
    assert [any(f"checkpoint-{step}" in each for each in warnings(caplog)) for step in (3, 2, 1)] == [
        True,
        True,
        False,
    ]


def test_where_every_checkpoint_is_torn_the_newest_ones_fault_is_told(
    server, loaded, output, tmp_path
) -> None:
    for step in (1, 2, 3):
        tear(on_server(server, tmp_path.name, step) / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="step 3 of run"):
        resume(loaded, output)


def test_a_checkpoint_that_was_named_is_taken_or_refused(server, loaded, output, tmp_path) -> None:
    tear(on_server(server, tmp_path.name, 3) / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="torn"):
        resume(loaded, output, str(output / "checkpoint-3"))
    assert resume(loaded, output, str(output / "checkpoint-1"))[0] == 1


# ---------------------------------------------------------------- a run that is half stepped


class BreakOptimizer(TrainerCallback):
    """After this step torch's optimizer on the server fails at the next, in the middle of its weights."""

    def __init__(self, server: TrunkServer, step: int) -> None:
        self.server, self.step = server, step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        def tamper(run: Run) -> None:
            run.optimizer.state[list(run.masters.values())[1]]["exp_avg"] = torch.zeros(7)

        if state.global_step == self.step:
            self.step = 0
            self.server.engine.runs.do(model.trunk.run.name, tamper).result(WAIT_S)


def test_a_training_goes_back_by_itself_where_the_trunks_optimizer_failed_halfway(
    server, loaded, tmp_path
) -> None:
    with loaded() as model:
        one = trainer(model, tmp_path / "out", 4, save_steps=2, optim="adamw_torch")
        one.add_callback(BreakOptimizer(server, 3))
        one.train()
        weights = model.adapter_weights()
    with load(server, f"{tmp_path.name}-plain") as model:
        trainer(model, tmp_path / "plain", 4, save_strategy="no", optim="adamw_torch").train()
        expected = model.adapter_weights()
    assert all(torch.equal(weights[name], each) for name, each in expected.items())


def test_without_a_checkpoint_the_user_is_told_what_to_do_and_can_begin_anew(
    server, loaded, tmp_path
) -> None:
    with loaded() as model:
        one = trainer(model, tmp_path / "out", 3, save_strategy="no", optim="adamw_torch")
        one.add_callback(BreakOptimizer(server, 1))
        with pytest.raises(RunBroken, match=r"start_over\(\)"):
            one.train()
        with pytest.raises(RunBroken):
            model.trunk.save()
        model.trunk.start_over()
        trainer(model, tmp_path / "again", 1, save_strategy="no", optim="adamw_torch").train()
        assert model.trunk.run.step == 1


# ---------------------------------------------------------------- a full disk


def test_a_save_without_room_ends_the_training_and_leaves_the_checkpoint_before_it(
    server, loaded, output, tmp_path, monkeypatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(server._hall.runs, "_budget", DiskBudget(server.config.state_dir, 1))
        with pytest.raises(ResourceExhausted, match=r"step 4 of run .*--disk-budget"):
            resume(loaded, output)
    with loaded() as model:
        assert model.trunk.transport.run_facts(tmp_path.name).checkpoints == (1, 2, 3)
    assert resume(loaded, output)[0] == 3


# ---------------------------------------------------------------- which checkpoints stay


def step(model: Any) -> None:
    model(IDS[:1], labels=IDS[:1]).loss.backward()
    model.trunk.step()


def test_the_server_keeps_a_checkpoint_until_both_sides_have_a_newer_one(loaded) -> None:
    with loaded() as model:
        for _ in range(2):
            step(model)
            kept = model.trunk.save().checkpoints
        assert kept == (1, 2), "nobody said that the client has step 2, too"
        step(model)
        model.trunk.acknowledge(99)
        assert model.trunk.save().checkpoints == (1, 2, 3), "the server has no step 99: it is no common one"
        model.trunk.acknowledge(2)
        step(model)
        assert model.trunk.save().checkpoints == (2, 3, 4)


def test_a_save_that_is_refused_lets_nothing_go_that_is_still_needed(loaded) -> None:
    with loaded() as model:
        for _ in range(2):
            step(model)
            model.trunk.save()
        model.trunk.acknowledge(2)
        run = model.trunk.run
        run.step += 1
        with pytest.raises(StepOutOfOrder):
            model.trunk.save()
        run.step -= 1
        assert model.trunk.transport.run_facts(run.name).checkpoints == (1, 2)


def test_what_is_no_longer_needed_goes_before_a_save_is_refused_for_want_of_room(loaded) -> None:
    with loaded() as model:
        for _ in range(MAX_CHECKPOINTS):
            step(model)
            model.trunk.save()
        step(model)
        with pytest.raises(ResourceExhausted, match=r"save_total_limit"):
            model.trunk.save()
        model.trunk.acknowledge(MAX_CHECKPOINTS)
        assert model.trunk.save().checkpoints == (MAX_CHECKPOINTS, MAX_CHECKPOINTS + 1)


def folders(output: Path) -> set[str]:
    return {each.name for each in output.glob("checkpoint-*")}


def test_the_last_k_stay_on_both_sides(loaded, tmp_path) -> None:
    with loaded() as model:
        trainer(model, tmp_path / "out", 5, save_total_limit=2).train()
        kept = model.trunk.transport.run_facts(tmp_path.name).checkpoints
    assert folders(tmp_path / "out") == {"checkpoint-4", "checkpoint-5"}
    assert kept == (3, 4, 5), "one more, until the next save says that step 4 is on both sides"


def test_the_best_and_the_last_k_stay_on_both_sides_and_the_best_is_what_training_ends_with(
    loaded, tmp_path
) -> None:
    """The highest loss counts as the best here: it is that of the first step."""
    first: list[Weights] = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
            first.append(model.adapter_weights())

    how = {
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "greater_is_better": True,
    }
    with loaded() as model:
        one = trainer(model, tmp_path / "out", 6, **how)
        one.train_dataset = DATA[:2]
        one.add_callback(Look())
        one.train()
        assert one.state.best_model_checkpoint.endswith("checkpoint-1")
        assert model.trunk.run.step == 1
        weights = model.adapter_weights()
        kept = model.trunk.transport.run_facts(tmp_path.name).checkpoints
    assert all(torch.equal(weights[name], each) for name, each in first[0].items())
    assert folders(tmp_path / "out") == {"checkpoint-1", "checkpoint-6"}
    assert kept == (1, 5, 6)
