"""A trainer that is a member trains what a private run trains; a lost server costs it one step's work."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback, TrainingArguments

from splitlearn import AutoSplitModelForCausalLM, CohortSettings, SplitTrainer, TrunkServer
from splitlearn.engine.run import Run
from splitlearn.testing import lively_model
from splitlearn.training.batches import PaddedBatch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STEPS = 6
DROPOUT = 0.1
ALONE = CohortSettings("sync", members=1, clip_norm=0.5)
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model("llama", tmp_path_factory.mktemp("model"))


def examples() -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(1)
    rows = [
        torch.randint(3, 128, (int(torch.randint(8, 20, (), generator=draw)),), generator=draw).tolist()
        for _ in range(24)
    ]
    return [{"input_ids": row, "labels": row} for row in rows]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Servers:
    """One address, and who serves there now."""

    def __init__(self, model: Path, state_dir: Path) -> None:
        self._model, self._state_dir, self.port = model, state_dir, free_port()
        self.now = self._start()

    def restart(self) -> None:
        self.now.stop()
        self.now = self._start()

    def _start(self) -> TrunkServer:
        return TrunkServer(
            self._model,
            port=self.port,
            device="cpu",
            dtype="float32",
            state_dir=self._state_dir,
            drain_s=0.1,
            sessions={"session_tokens": 64, "kv_budget_bytes": 1 << 20},
        ).start()


@contextmanager
def serving(model: Path, state_dir: Path) -> Iterator[Servers]:
    servers = Servers(model, state_dir)
    try:
        yield servers
    finally:
        servers.now.stop()


class At(TrainerCallback):
    """Does something once: between two microbatches of a step, or after the step."""

    def __init__(self, step: int, what: Callable[[], None], *, between: bool) -> None:
        self._step, self._what, self._between = step, what, between

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._between:
            self._do(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._between:
            self._do(state)

    def _do(self, state: Any) -> None:
        if state.global_step == self._step:
            self._step = -1
            self._what()


def trained(
    model: Path,
    address: str,
    output: Path,
    *callbacks: TrainerCallback,
    frozen: tuple[str, ...] = (),
    dropout: float = DROPOUT,
    resume: bool = False,
    steps: int = STEPS,
    **shared: Any,
) -> Weights:
    """The whole adapter after so many steps."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear")
    split = AutoSplitModelForCausalLM.from_pretrained(
        model, trunk=address, dtype="float32", lora=lora, run="notes", freeze=frozen, **shared
    )
    arguments = TrainingArguments(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        save_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = SplitTrainer(
        model=split,
        args=arguments,
        train_dataset=examples(),
        data_collator=PaddedBatch(0),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume or None)
    weights = split.adapter_weights()
    split.trunk.close_run()
    split.close()
    return weights


def same(ours: Weights, theirs: Weights) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_cohort_of_one_trains_the_trunk_as_a_private_run_does(model, tmp_path):
    """Without dropout, whose seeds are the member's own; the trunk alone, whose norm is then the model's."""
    how = {"frozen": ("bottom", "top"), "dropout": 0.0}
    with serving(model, tmp_path / "private") as servers:
        private = trained(model, servers.now.address, tmp_path / "out1", **how)
    with serving(model, tmp_path / "shared") as servers:
        shared = trained(model, servers.now.address, tmp_path / "out2", cohort=ALONE, member="a", **how)
    assert same(shared, private)


def test_a_cohort_of_one_that_shares_all_parts_trains_them_as_a_private_run_does(model, tmp_path):
    """Clipped by one norm on both sides; its terms are added up in another order."""
    how = {"dropout": 0.0}
    with serving(model, tmp_path / "private") as servers:
        private = trained(model, servers.now.address, tmp_path / "out1", **how)
    with serving(model, tmp_path / "shared") as servers:
        how |= {"cohort": ALONE, "member": "a", "share": "sync"}
        shared = trained(model, servers.now.address, tmp_path / "out2", **how)
    with serving(model, tmp_path / "restarted") as servers:
        restart = At(3, servers.restart, between=True)
        restarted = trained(model, servers.now.address, tmp_path / "out3", restart, **how)
    apart = torch.cat([(shared[name] - private[name]).flatten() for name in private]).norm()
    assert float(apart / torch.cat([each.flatten() for each in private.values()]).norm()) <= 1e-4
    assert same(restarted, shared)


@pytest.mark.parametrize(
    ("between", "dropout"),
    # The servers draw random numbers in this process, too: only a step that begins anew takes its own back.
    [(True, DROPOUT), (False, 0.0)],
    ids=["between microbatches", "between steps"],
)
def test_a_restarted_server_changes_no_bit(model, tmp_path, between, dropout):
    how = {"cohort": ALONE, "member": "a", "dropout": dropout}
    with serving(model, tmp_path / "state1") as servers:
        undisturbed = trained(model, servers.now.address, tmp_path / "out1", **how)
    with serving(model, tmp_path / "state2") as servers:
        restart = At(3, servers.restart, between=between)
        found = trained(model, servers.now.address, tmp_path / "out2", restart, **how)
    assert same(found, undisturbed)


def test_a_run_whose_optimizer_failed_halfway_comes_back_from_the_disk(model, tmp_path):
    how = {"cohort": ALONE, "member": "a", "dropout": 0.0}
    with serving(model, tmp_path / "state1") as servers:
        undisturbed = trained(model, servers.now.address, tmp_path / "out1", **how)
    failed = []

    def fail_halfway(run: Run) -> None:
        def fail() -> None:
            failed.append(run.step)
            raise RuntimeError("the device went away")

        next(iter(run.masters.values())).data.add_(1.0)
        run.optimizer.step = fail

    with serving(model, tmp_path / "state2") as servers:
        engine = servers.now._hall.engine
        breaking = At(3, lambda: engine.runs.do("notes", fail_halfway).result(30), between=False)
        found = trained(model, servers.now.address, tmp_path / "out2", breaking, **how)
    assert failed == [3]
    assert same(found, undisturbed)


@pytest.mark.parametrize("share", ["personal", "sync"])
def test_a_member_that_is_restarted_goes_on_from_its_own_checkpoint(model, tmp_path, share):
    """Personal ends then see a trunk that is ahead; shared ones are the run's. Steps count once."""
    how = {"cohort": ALONE, "member": "a", "member_key": tmp_path / "key", "share": share}
    with serving(model, tmp_path / "state") as servers:
        address = servers.now.address
        trained(model, address, tmp_path / "out", steps=3, **how)
        trained(model, address, tmp_path / "out", resume=True, **how)
        ledger = servers.now._hall.runs.ledger("notes")
    steps = [part["step"] for line in ledger if '"round"' in line for part in _round(line)]
    assert steps == list(range(1, STEPS + 1))


def _round(line: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = json.loads(line)["parts"]
    return parts
