"""A training goes on from the newest checkpoint that is whole on both sides, whatever became of the newer."""

import json
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
from splitlearn.errors import (
    CheckpointError,
    ResourceExhausted,
    RunBroken,
    RunLost,
    RunTakenOver,
    StepOutOfOrder,
    UnsupportedCall,
)
from splitlearn.testing.tiny import tiny_model
from splitlearn.training.checkpoint import NOTE, WEIGHTS, note_of

pytestmark = pytest.mark.slow
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
        again = trainer(model, tmp_path / "again", 1, save_strategy="no", optim="adamw_torch")
        with pytest.raises(UnsupportedCall, match="load the model again"):
            again.train()
        with pytest.raises(UnsupportedCall, match="load the model again"):
            model(IDS[:1], labels=IDS[:1])
    with loaded() as model:
        trainer(model, tmp_path / "again", 1, save_strategy="no", optim="adamw_torch").train()
        assert model.trunk.run.step == 1


def test_the_other_way_round_is_as_good(loaded, tmp_path) -> None:
    """Loaded again, and only then started over, as the error of a broken run says."""
    with loaded() as model:
        trainer(model, tmp_path / "out", 2, save_strategy="no").train()
        expected = model.adapter_weights()
    with loaded() as model:
        model.trunk.start_over()
        trainer(model, tmp_path / "again", 2, save_strategy="no").train()
        weights = model.adapter_weights()
    assert all(torch.equal(weights[name], each) for name, each in expected.items())


def test_a_model_that_has_resumed_does_not_go_on_with_a_fresh_trunk_either(loaded, output) -> None:
    with loaded() as model:
        trainer(model, output, 3).train(resume_from_checkpoint=True)
        model.trunk.start_over()
        with pytest.raises(UnsupportedCall, match="load the model again"):
            trainer(model, output, 4).train()


# ---------------------------------------------------------------- halves of different trainings


def test_halves_of_different_trainings_under_one_name_are_not_joined(loaded, output, tmp_path) -> None:
    with loaded() as model:
        model.trunk.start_over()
        trainer(model, tmp_path / "other", 3, learning_rate=0.5).train()
    for wanted in (True, str(output / "checkpoint-2")):
        with pytest.raises(CheckpointError, match=r"run .* started over.*another run name"):
            resume(loaded, output, wanted)
    note = note_of(output / "checkpoint-3")
    with loaded() as model, pytest.raises(CheckpointError, match="started over"):
        model.trunk.restore(note.run, note.step, note.trunk)
    assert resume(loaded, tmp_path / "other")[0] == 3, "its own half is still there"


def test_a_training_that_was_continued_elsewhere_is_not_joined_with_what_came_of_it(
    loaded, output, tmp_path
) -> None:
    with loaded() as model:
        other = trainer(model, tmp_path / "other", 3)
        other.train_dataset = DATA[::-1]
        other.train(resume_from_checkpoint=str(output / "checkpoint-1"))
        assert model.trunk.transport.run_facts(tmp_path.name).checkpoints == (2, 3)
    with pytest.raises(CheckpointError, match=r"steps 3, 2 of run .* trained on from elsewhere"):
        resume(loaded, output)
    assert resume(loaded, tmp_path / "other")[0] == 3


def test_a_note_from_before_notes_named_the_other_half_is_still_taken(loaded, output) -> None:
    for note in output.glob(f"checkpoint-*/{NOTE}"):
        told = json.loads(note.read_text())
        assert told.pop("trunk")
        note.write_text(json.dumps(told))
    assert resume(loaded, output)[0] == 3


# ---------------------------------------------------------------- a run that somebody else takes over


class Meanwhile(TrainerCallback):
    """Something that happens once, after this step."""

    def __init__(self, step: int, do: Callable[[], Any]) -> None:
        self.step, self.do = step, do

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.step = 0
            self.do()


@pytest.mark.parametrize("is_lost", [False, True], ids=["while it is open", "after the server had lost it"])
@pytest.mark.parametrize("save_steps", [1, 2], ids=["before a save", "before a step"])
def test_the_older_of_two_trainings_ends_and_the_newer_one_goes_on(
    server, loaded, tmp_path, is_lost, save_steps
) -> None:
    with loaded() as older, loaded() as newer:

        def take_over() -> None:
            if is_lost:
                server.engine.runs.close(tmp_path.name).result(WAIT_S)
            newest = max(older.trunk.transport.run_facts(tmp_path.name).checkpoints)
            newer.trunk.restore(tmp_path.name, newest)

        one = trainer(older, tmp_path / "out", 6, save_steps=save_steps)
        one.add_callback(Meanwhile(3, take_over))
        with pytest.raises(RunTakenOver, match="et this training end"):
            one.train()
        newest = 2
        assert folders(tmp_path / "out") == {
            f"checkpoint-{step}" for step in range(save_steps, 3, save_steps)
        }
        assert newer.trunk.run.step == newest
        step(newer)
        assert newer.trunk.save().step == newest + 1


def test_a_run_is_not_restored_to_the_checkpoint_that_did_not_help(server, loaded, output, tmp_path) -> None:
    """Lost again before a newer one: the loss is told, and the server's run is left as it is."""
    lose = Meanwhile(4, lambda: server.engine.runs.close(tmp_path.name).result(WAIT_S))
    with loaded() as model:
        one = trainer(model, output, 6, save_steps=9)
        one.add_callback(lose)
        with pytest.raises(RunLost):
            one.train(resume_from_checkpoint=True)
        assert model.trunk.transport.run_facts(tmp_path.name).state == "saved"


def test_what_clipping_found_before_the_loss_scales_no_later_step(loaded, output) -> None:
    with loaded() as model:
        model.trunk.gradient_scale = 0.5
        model.trunk.restore(note_of(output / "checkpoint-3").run, 3)
        assert model.trunk.gradient_scale == 1.0


def test_a_model_of_another_dtype_takes_nothing_from_a_checkpoint_and_nobodys_run(
    server, loaded, tmp_path
) -> None:
    how = {"full": ["top"]}
    with loaded(**how) as model:
        trainer(model, tmp_path / "out", 1).train()
        with (
            loaded(**how, dtype="bfloat16") as other,
            pytest.raises(CheckpointError, match=r"as float32 .*this model as bfloat16"),
        ):
            trainer(other, tmp_path / "out", 2).train(resume_from_checkpoint=True)
        step(model)
        assert model.trunk.run.incarnation == 1, "nobody was turned away"


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
