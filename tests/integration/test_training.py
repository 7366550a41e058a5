"""Training over a real server changes the adapter exactly as PEFT and Trainer change the whole model's."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from splitlearn import AutoSplitModelForCausalLM, SplitTrainer, TrunkServer
from splitlearn.client.training import clip_grad_norm
from splitlearn.config import AnomalyConfig
from splitlearn.engine.contribution import Contribution, Microbatch
from splitlearn.errors import (
    CheckpointError,
    RunLost,
    SettingError,
    TrunkUnreachable,
    UnappliedGradients,
    UnsupportedCall,
)
from splitlearn.model.lora import ADAPTER, add_lora, settings_of, weights_of
from splitlearn.testing.tiny import tiny_model, tiny_whole
from splitlearn.vocabulary import Phase

FAMILIES = ["llama", "gemma3_text", "qwen2_moe", "phi", "gpt2"]
NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
SEED, STEPS = 7, 20
WAIT_S = 60.0
IDS = torch.randint(4, 100, (42, 12), generator=torch.Generator().manual_seed(1))
DATA = [{"input_ids": row, "labels": row} for row in IDS]
Weights = dict[str, Tensor]


def lora(**how: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **how)


def arguments(folder: Path, **how: Any) -> TrainingArguments:
    told = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "max_grad_norm": 0.3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(str(folder), **(told | how))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "model")


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., AbstractContextManager[TrunkServer]]:
    def served(folder: Path, **how: Any) -> TrunkServer:
        sessions = {"session_tokens": 64, "kv_budget_bytes": 1 << 24}
        state_dir = tmp_path / "state"
        return TrunkServer(folder, port=0, device="cpu", sessions=sessions, state_dir=state_dir, **how)

    return served


@contextmanager
def loaded(folder: Path, server: TrunkServer, config: LoraConfig | None = None, **how: Any) -> Iterator[Any]:
    model = AutoSplitModelForCausalLM.from_pretrained(
        folder, trunk=server.address, lora=config or lora(), seed=SEED, **how
    )
    try:
        yield model
    finally:
        model.close()


def whole_with_adapter(folder: Path, config: LoraConfig | None = None) -> Any:
    whole = tiny_whole(folder)
    add_lora(whole, settings_of(config or lora(), whole.config.model_type), ADAPTER, SEED)
    return whole


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same(ours: Weights, theirs: Weights) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def of(model: Any) -> Weights:
    return {name: weight.detach().clone() for name, weight in weights_of(model, ADAPTER).items()}


def update_distance(before: Weights, ours: Weights, theirs: Weights) -> float:
    apart = sum((ours[name] - theirs[name]).square().sum() for name in theirs)
    moved = sum((theirs[name] - before[name]).square().sum() for name in theirs)
    return float((apart / moved).sqrt())


# ---------------------------------------------------------------- exactly


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_are_those_of_the_whole_model_bit_for_bit(family: str, tmp_path: Path, serve) -> None:
    """With accumulation, clipping by the whole norm, cosine schedule, weight decay and evaluation."""
    folder = tiny_model(family, tmp_path / "model", **NO_DROPOUT.get(family, {}))
    whole = whole_with_adapter(folder)
    how = {"eval_strategy": "steps", "eval_steps": 10}
    data = {"train_dataset": DATA, "eval_dataset": DATA[:6]}
    theirs = Trainer(whole, arguments(tmp_path / "a", **how), **data)
    theirs.train()
    with serve(folder) as server, loaded(folder, server) as model:
        ours = SplitTrainer(
            model, arguments(tmp_path / "b", **how), train_dataset=DATA, eval_dataset=DATA[:6]
        )
        ours.train()
        for key in ("loss", "grad_norm", "eval_loss", "learning_rate"):
            told = [[e[key] for e in t.state.log_history if key in e] for t in (ours, theirs)]
            assert told[0] == told[1], key
        assert same(model.adapter_weights(), of(whole))
        texts = [
            each.eval().generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
            for each in (model, whole)
        ]
        assert torch.equal(*texts)


def test_clipping_the_trunk_by_its_own_norm_is_another_training(tmp_path: Path, folder: Path, serve) -> None:
    """The control of the equality above."""

    class Apart(SplitTrainer):
        def _clip(self, model: Any, max_norm: float) -> Tensor:
            norms = self._trunk.grad_norms()
            total = clip_grad_norm(model, max_norm)
            self._trunk.gradient_scale = min(1.0, max_norm / float(torch.linalg.vector_norm(norms)))
            return total

    whole = whole_with_adapter(folder)
    before = of(whole)
    Trainer(whole, arguments(tmp_path / "a"), train_dataset=DATA).train()
    with serve(folder) as server, loaded(folder, server) as model:
        Apart(model, arguments(tmp_path / "b"), train_dataset=DATA).train()
        assert update_distance(before, model.adapter_weights(), of(whole)) > 1e-3


def test_under_autocast_both_round_alike(tmp_path: Path, folder: Path, serve) -> None:
    whole = whole_with_adapter(folder)
    before = of(whole)
    Trainer(whole, arguments(tmp_path / "a", bf16=True), train_dataset=DATA).train()
    with serve(folder) as server, loaded(folder, server) as model:
        SplitTrainer(model, arguments(tmp_path / "b", bf16=True), train_dataset=DATA).train()
        assert update_distance(before, model.adapter_weights(), of(whole)) <= 1e-3


@pytest.mark.parametrize(
    "rates", [{"trunk": 1e-3}, {"bottom": 2e-3, "trunk": 3e-2, "top": 5e-3}, {"bottom": 2e-3}], ids=str
)
def test_each_part_may_learn_at_a_rate_of_its_own(
    tmp_path: Path, folder: Path, serve, rates: dict[str, float]
) -> None:
    whole = whole_with_adapter(folder)
    groups: dict[str, list[Tensor]] = {"bottom": [], "trunk": [], "top": []}
    for name, weight in weights_of(whole, ADAPTER).items():
        layer = int(name.split(".")[2])
        groups["bottom" if layer < 2 else "trunk" if layer < 4 else "top"].append(weight)
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr": rates.get(part, 1e-2)} for part, params in groups.items()],
        weight_decay=0.01,
        fused=True,
    )
    Trainer(whole, arguments(tmp_path / "a"), train_dataset=DATA, optimizers=(optimizer, None)).train()
    with serve(folder) as server, loaded(folder, server) as model:
        how = arguments(tmp_path / "b")
        SplitTrainer(model, how, train_dataset=DATA, learning_rates=rates).train()
        assert same(model.adapter_weights(), of(whole))


def test_a_last_partial_accumulation_is_used(tmp_path: Path, folder: Path, serve) -> None:
    """Five batches an epoch, two a step: the third step of each epoch has one."""
    how = {"max_steps": -1, "num_train_epochs": 2}
    whole = whole_with_adapter(folder)
    Trainer(whole, arguments(tmp_path / "a", **how), train_dataset=DATA[:10]).train()
    with serve(folder) as server, loaded(folder, server) as model:
        SplitTrainer(model, arguments(tmp_path / "b", **how), train_dataset=DATA[:10]).train()
        assert model.trunk.run.step == 6
        assert same(model.adapter_weights(), of(whole))


# ---------------------------------------------------------------- float16


class HalfOnCpu:
    """float16 with loss scaling, which accelerate gives to GPUs alone; `at` is a step that overflows."""

    at = -1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=4)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.float16):
            loss = super().compute_loss(*args, **kwargs)
        return loss * 1e30 if self.state.global_step == self.at and self.model.training else loss


class WholeInHalf(HalfOnCpu, Trainer):
    pass


class SplitInHalf(HalfOnCpu, SplitTrainer):
    pass


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitlearn.training.run_plan.autocast_of", lambda args: "float16")


@pytest.mark.usefixtures("half")
def test_an_overflow_skips_the_step_on_both_sides_once(
    tmp_path: Path, folder: Path, serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HalfOnCpu, "at", 3)
    whole = whole_with_adapter(folder)
    before = of(whole)
    theirs = WholeInHalf(whole, arguments(tmp_path / "a", max_steps=8), train_dataset=DATA)
    theirs.train()
    with serve(folder) as server, loaded(folder, server) as model:
        ours = SplitInHalf(model, arguments(tmp_path / "b", max_steps=8), train_dataset=DATA)
        ours.train()
        run = server.engine.runs.do(model.trunk.run.name, lambda run: (run.step, run.version, run.skipped))
        assert run.result(WAIT_S) == (8, 7, 1)
        assert update_distance(before, model.adapter_weights(), of(whole)) <= 1e-3
        assert ours.accelerator.scaler.get_scale() == theirs.accelerator.scaler.get_scale()


@pytest.mark.usefixtures("half")
def test_with_loss_scaling_too_the_trunk_is_asked_for_its_norms_once_a_step(
    tmp_path: Path, folder: Path, serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(folder) as server, loaded(folder, server) as model:
        asked: list[Phase] = []
        answered = model.trunk.transport.run_step
        monkeypatch.setattr(
            model.trunk.transport, "run_step", lambda m: asked.append(m.key.phase) or answered(m)
        )
        SplitInHalf(model, arguments(tmp_path, max_steps=3), train_dataset=DATA).train()
    assert asked.count(Phase.GRADIENT_NORMS) == asked.count(Phase.OPTIMIZER_STEP) == 3


@pytest.mark.usefixtures("half")
def test_an_overflow_of_the_trunk_alone_stops_the_clients_step_too(
    tmp_path: Path, folder: Path, serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Contribution.add_once

    def overflowing(held: Contribution, microbatch: Microbatch, gradients: Any, loss_scale: float) -> None:
        if microbatch[0] == 3:
            gradients = [each if each is None else each.fill_(float("inf")) for each in gradients]
        add(held, microbatch, gradients, loss_scale)

    monkeypatch.setattr(Contribution, "add_once", overflowing)
    seen: list[Weights] = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
            seen.append(of(model))

    with serve(folder) as server, loaded(folder, server) as model:
        trainer = SplitInHalf(model, arguments(tmp_path, max_steps=4), train_dataset=DATA, callbacks=[Look()])
        trainer.train()
        assert model.trunk.run.version == 3
    assert same(seen[2], seen[1]), "the client stepped where the trunk could not"
    assert not same(seen[3], seen[2])


# ---------------------------------------------------------------- anomalies


class BrokenAt(SplitTrainer):
    """A loss that is no number at the third step."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss


def test_a_step_without_numbers_moves_neither_side(tmp_path: Path, folder: Path, serve) -> None:
    versions: list[tuple[int, Weights]] = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
            versions.append((model.trunk.run.version, model.adapter_weights()))

    with serve(folder) as server, loaded(folder, server) as model:
        trainer = BrokenAt(model, arguments(tmp_path, max_steps=4), train_dataset=DATA, callbacks=[Look()])
        trainer.train()
    assert trainer.anomalies.seen == {"not_finite": 1}
    assert [version for version, _ in versions] == [1, 2, 2, 3]
    assert same(versions[2][1], versions[1][1])
    assert not same(versions[3][1], versions[2][1])


def test_an_anomaly_can_end_training_with_a_checkpoint(tmp_path: Path, folder: Path, serve) -> None:
    with serve(folder) as server, loaded(folder, server) as model:
        how = arguments(tmp_path / "out", save_strategy="steps", save_steps=100)
        trainer = BrokenAt(model, how, train_dataset=DATA, anomalies=AnomalyConfig(action="stop"))
        trainer.train()
        assert trainer.state.global_step == 3
        assert (tmp_path / "out" / "checkpoint-3" / "splitlearn.json").is_file()


def test_a_leap_of_the_norm_lowers_the_rate_on_both_sides(tmp_path: Path, folder: Path, serve) -> None:
    slow = AnomalyConfig(action="slow", spike_factor=1e-6, min_history=1, slow_factor=1e-6)
    updates = []
    for anomalies in (None, slow):
        with serve(folder) as server, loaded(folder, server) as model:
            before = {}
            how = arguments(tmp_path, max_steps=2, lr_scheduler_type="constant", weight_decay=0.0)

            class Look(TrainerCallback):
                def on_step_end(self, *args: Any, model: Any, before: Any = before, **kwargs: Any) -> None:
                    before.setdefault("first", model.adapter_weights())

            trainer = SplitTrainer(model, how, train_dataset=DATA, anomalies=anomalies, callbacks=[Look()])
            trainer.train()
            after = model.adapter_weights()
            updates.append({name: float((after[name] - before["first"][name]).abs().max()) for name in after})
            assert trainer.optimizer.param_groups[0]["lr"] == 1e-2
    for name, usual in updates[0].items():
        assert updates[1][name] <= 1e-3 * usual, name


# ---------------------------------------------------------------- checkpoints


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(trainer: SplitTrainer) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


@pytest.fixture
def undisturbed(tmp_path: Path, folder: Path, serve) -> Weights:
    with serve(folder) as server, loaded(folder, server, lora(lora_dropout=0.2)) as model:
        SplitTrainer(model, arguments(tmp_path / "undisturbed"), train_dataset=DATA).train()
        return model.adapter_weights()


def test_after_both_sides_ended_the_run_goes_on_bit_for_bit(
    tmp_path: Path, folder: Path, serve, undisturbed: Weights
) -> None:
    how = arguments(tmp_path / "out", save_strategy="steps", save_steps=4, save_total_limit=2)
    with serve(folder) as server, loaded(folder, server, lora(lora_dropout=0.2), run="notes") as model:
        interrupted(SplitTrainer(model, how, train_dataset=DATA, callbacks=[StopAt(10)]))
    with serve(folder) as server, loaded(folder, server, lora(lora_dropout=0.2), run="notes") as model:
        trainer = SplitTrainer(model, how, train_dataset=DATA)
        trainer.train(resume_from_checkpoint=True)
        assert len(losses(trainer)) == STEPS
        assert same(model.adapter_weights(), undisturbed)


def test_where_the_halves_differ_both_go_back_to_the_newest_that_both_have(
    tmp_path: Path, folder: Path, serve, undisturbed: Weights
) -> None:
    how = arguments(tmp_path / "out", save_strategy="steps", save_steps=4)
    with serve(folder) as server, loaded(folder, server, lora(lora_dropout=0.2), run="notes") as model:
        interrupted(SplitTrainer(model, how, train_dataset=DATA, callbacks=[StopAt(10)]))
    (tmp_path / "out" / "checkpoint-8" / "splitlearn.json").unlink()
    with serve(folder) as server, loaded(folder, server, lora(lora_dropout=0.2), run="notes") as model:
        SplitTrainer(model, how, train_dataset=DATA).train(resume_from_checkpoint=True)
        assert same(model.adapter_weights(), undisturbed)


class LoseTheRun(TrainerCallback):
    """As a server does that restarts between two steps: what it saved is still there."""

    def __init__(self, server: TrunkServer, steps: list[int]) -> None:
        self.server, self.steps = server, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.steps and state.global_step == self.steps[0]:
            self.steps.pop(0)
            self.server.engine.runs.close("notes").result(WAIT_S)


def test_where_the_server_loses_the_run_both_go_back_and_train_on(
    tmp_path: Path, folder: Path, serve, undisturbed: Weights
) -> None:
    how = arguments(tmp_path / "out", save_strategy="steps", save_steps=4)
    with serve(folder) as server, loaded(folder, server, lora(lora_dropout=0.2), run="notes") as model:
        callbacks = [LoseTheRun(server, [6, 14])]
        SplitTrainer(model, how, train_dataset=DATA, callbacks=callbacks).train()
        assert same(model.adapter_weights(), undisturbed)


@pytest.mark.parametrize("steps", [[2], [6, 6]], ids=["before any checkpoint", "twice without a newer one"])
def test_where_there_is_nothing_to_go_back_to_the_loss_is_told(
    tmp_path: Path, folder: Path, serve, steps: list[int]
) -> None:
    how = arguments(tmp_path / "out", save_strategy="steps", save_steps=4)
    with serve(folder) as server, loaded(folder, server, run="notes") as model:
        trainer = SplitTrainer(model, how, train_dataset=DATA, callbacks=[LoseTheRun(server, steps)])
        with pytest.raises(RunLost):
            trainer.train()


def test_a_checkpoint_whose_other_half_is_gone_is_not_resumed_from(
    tmp_path: Path, folder: Path, serve
) -> None:
    how = arguments(tmp_path / "out", save_strategy="steps", save_steps=4, max_steps=4)
    with serve(folder) as server:
        with loaded(folder, server, run="notes") as model:
            SplitTrainer(model, how, train_dataset=DATA).train()
        server._hall.runs.delete("notes")
        with (
            loaded(folder, server, run="notes") as model,
            pytest.raises(CheckpointError, match="from the start"),
        ):
            SplitTrainer(model, how, train_dataset=DATA).train(resume_from_checkpoint=True)


# ---------------------------------------------------------------- never silently wrong


def test_a_plain_trainer_is_told_that_the_trunk_is_not_stepped(tmp_path: Path, folder: Path, serve) -> None:
    with (
        serve(folder) as server,
        loaded(folder, server) as model,
        pytest.raises(UnappliedGradients, match="SplitTrainer"),
    ):
        Trainer(model, arguments(tmp_path), train_dataset=DATA).train()


def test_a_run_that_is_open_with_another_optimizer_is_refused(tmp_path: Path, folder: Path, serve) -> None:
    with serve(folder) as server, loaded(folder, server) as model:
        model(IDS[:1], labels=IDS[:1]).loss.backward()
        model.trunk.step()
        with pytest.raises(SettingError, match="make the trainer before"):
            SplitTrainer(model, arguments(tmp_path), train_dataset=DATA)


def test_a_run_that_has_stepped_is_not_mixed_with_a_fresh_client(tmp_path: Path, folder: Path, serve) -> None:
    how = arguments(tmp_path, max_steps=2)
    with serve(folder) as server:
        with loaded(folder, server, run="notes") as model:
            SplitTrainer(model, how, train_dataset=DATA).train()
            expected = model.adapter_weights()
        with loaded(folder, server, run="notes") as model:
            trainer = SplitTrainer(model, how, train_dataset=DATA)
            with pytest.raises(SettingError, match="start_over"):
                trainer.train()
            model.trunk.start_over()
            trainer.train()
            assert same(model.adapter_weights(), expected)


def test_a_losing_connection_costs_nothing(tmp_path: Path, folder: Path, serve, monkeypatch) -> None:
    """Each answer of a backward and of an optimizer step is lost once, after the work was done."""
    whole = whole_with_adapter(folder)
    Trainer(whole, arguments(tmp_path / "a", max_steps=4), train_dataset=DATA).train()
    with serve(folder) as server, loaded(folder, server) as model:
        transport, lost = model.trunk.transport, set()
        answered = transport.run_step

        def losing(message: Any) -> Any:
            answer = answered(message)
            if message.key.phase in (Phase.BACKWARD, Phase.OPTIMIZER_STEP) and message.key not in lost:
                lost.add(message.key)
                raise TrunkUnreachable("the answer was lost")
            return answer

        monkeypatch.setattr(transport, "run_step", losing)
        SplitTrainer(model, arguments(tmp_path / "b", max_steps=4), train_dataset=DATA).train()
        assert len(lost) == 12
        assert same(model.adapter_weights(), of(whole))


def test_what_the_trunk_holds_must_be_known(folder: Path, serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(folder) as server, loaded(folder, server) as model:
        with monkeypatch.context() as broken:
            answered = model.trunk.transport.run_step

            def losing(message: Any) -> Any:
                answer = answered(message)
                if message.key.phase is Phase.BACKWARD:
                    raise TrunkUnreachable("the answer was lost")
                return answer

            broken.setattr(model.trunk.transport, "run_step", losing)
            with pytest.raises(TrunkUnreachable):
                model(IDS[:1], labels=IDS[:1]).loss.backward()
        with pytest.raises(UnappliedGradients, match="skip_step"):
            model(IDS[:1], labels=IDS[:1])
        model.trunk.skip_step()
        model(IDS[:1], labels=IDS[:1]).loss.backward()
        model.trunk.step()


def test_one_forward_gives_one_gradient(folder: Path, serve) -> None:
    with serve(folder) as server, loaded(folder, server) as model:
        logits = model(IDS[:1]).logits
        logits.sum().backward(retain_graph=True)
        with pytest.raises(UnsupportedCall, match="one gradient a forward"):
            logits.square().sum().backward()


def test_an_adapter_that_was_loaded_answers_from_the_first_call(tmp_path: Path, folder: Path, serve) -> None:
    with serve(folder) as server:
        with loaded(folder, server) as model:
            SplitTrainer(model, arguments(tmp_path / "a", max_steps=3), train_dataset=DATA).train()
            model.save_adapter(tmp_path / "adapter")
            expected = model.eval().generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
        again = AutoSplitModelForCausalLM.from_pretrained(
            folder, trunk=server.address, lora=tmp_path / "adapter"
        )
        found = again.eval().generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
        again.close()
        assert torch.equal(found, expected)


def test_clipping_twice_is_clipping_once(folder: Path, serve) -> None:
    with serve(folder) as server, loaded(folder, server) as model:
        model(IDS[:2], labels=IDS[:2]).loss.backward()
        clip_grad_norm(model, 1e-3)
        scale = model.trunk.gradient_scale
        assert float(clip_grad_norm(model, float("inf"))) == pytest.approx(1e-3, rel=1e-3)
        assert model.trunk.gradient_scale == scale < 1
