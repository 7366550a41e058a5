"""What a run leaves on the disk is listed, and can be deleted, whole or not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from splitlearn import AutoSplitModelForCausalLM, TrunkServer
from splitlearn.client.calls import delete_run, list_runs
from splitlearn.errors import MessageError, RunLost
from splitlearn.testing import tiny_model
from splitlearn.vocabulary import StepKey

WAIT_S = 20
IDS = torch.tensor([[5, 17, 42]])
SESSIONS = {"session_tokens": 64, "kv_budget_bytes": 1 << 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[TrunkServer]:
    with TrunkServer(folder, port=0, device="cpu", sessions=SESSIONS, state_dir=tmp_path) as running:
        yield running


def leave_behind(server: TrunkServer, run: str, size: int = 1000) -> Path:
    left = server._hall.runs._folder / run / "unfinished-0" / "adapter.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(size))
    return left


def test_a_run_that_has_no_whole_checkpoint_is_listed_and_deleted(server) -> None:
    leave_behind(server, "dead")
    (listed,) = list_runs(server.address, WAIT_S)
    assert (listed.name, listed.state, listed.checkpoints, listed.bytes_on_disk) == (
        "dead",
        "saved",
        (),
        1000,
    )
    assert delete_run(server.address, "dead", WAIT_S) == 1000
    assert list_runs(server.address, WAIT_S) == []
    with pytest.raises(RunLost):
        delete_run(server.address, "dead", WAIT_S)


def test_a_server_clears_up_when_it_starts(server, folder) -> None:
    left = leave_behind(server, "dead")
    server.stop()
    with TrunkServer(folder, port=0, device="cpu", sessions=SESSIONS, state_dir=server.config.state_dir):
        assert not left.parent.parent.exists()


def test_a_run_is_saved_under_its_own_name_and_number(server, folder) -> None:
    model = AutoSplitModelForCausalLM.from_pretrained(
        folder, trunk=server.address, lora=LoraConfig(r=2, target_modules=["q_proj"]), run="notes"
    )
    model(IDS, labels=IDS).loss.backward()
    model.trunk.step()
    run = model.trunk.run
    at = StepKey(run=run.number, incarnation=run.incarnation, step=1)
    with pytest.raises(MessageError, match="say its own name"):
        model.trunk.transport.save_run("letters", at, ())
    with pytest.raises(RunLost, match="join it again"):
        model.trunk.transport.save_run("notes", StepKey(incarnation=1, step=1), ())
    facts = model.trunk.transport.save_run("notes", at, ())
    assert facts.checkpoints == (1,)
    assert facts.digest_of(1) != 0
    model.close()
