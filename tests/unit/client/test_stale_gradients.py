"""A gradient that comes too late, by version or by age, is refused: nothing of it reaches the adapter."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from splitlearn import AutoSplitModelForCausalLM, TrunkServer
from splitlearn.engine.run import Run
from splitlearn.errors import StaleGradient, TapeExpired
from splitlearn.testing.tiny import tiny_model
from splitlearn.vocabulary import Phase
from splitlearn.wire.messages import RunStepMessage

IDS = torch.tensor([[5, 17, 42]])
WAIT_S, POLL_S = 20, 0.05
LEASE_S = 1.0  # enough for a forward and its backward on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


@contextmanager
def loaded(folder: Path, state_dir: Path, **runs: Any) -> Iterator[tuple[TrunkServer, Any]]:
    sessions = {"session_tokens": 64, "kv_budget_bytes": 1 << 20}
    how = {"port": 0, "device": "cpu", "sessions": sessions, "runs": runs, "state_dir": state_dir}
    with TrunkServer(folder, **how) as server:
        model = AutoSplitModelForCausalLM.from_pretrained(
            folder, trunk=server.address, lora=LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj"])
        )
        try:
            yield server, model.train()
        finally:
            model.close()


def gradients(server: TrunkServer, model: Any) -> dict[str, Any]:
    return server.engine.runs.do(model.trunk.run.name, Run.gradients).result(WAIT_S)


def until_expired(server: TrunkServer) -> None:
    due = time.monotonic() + WAIT_S
    while len(server.engine.tape):
        assert time.monotonic() < due
        time.sleep(POLL_S)


def test_by_version(folder, tmp_path) -> None:
    with loaded(folder, tmp_path, staleness_limit=0) as (server, model):
        model.trunk.run.accumulation = 2
        first, late = (model(IDS, labels=IDS).loss for _ in range(2))
        first.backward()
        model.trunk.step()
        before = model.adapter_weights()
        with pytest.raises(StaleGradient, match=r"used version 0, .* at 1") as refused:
            late.backward()
        assert refused.value.facts == {"current_version": 1, "staleness": 1}
        assert set(gradients(server, model).values()) == {None}
        after = model.adapter_weights()
        assert all(torch.equal(after[name], each) for name, each in before.items())
        model(IDS, labels=IDS).loss.backward()
        model.trunk.step()
        assert model.trunk.run.version == 2, "and it trains on"


def test_by_version_as_far_as_the_server_allows(folder, tmp_path) -> None:
    """The control of the test above: one step later is the default."""
    with loaded(folder, tmp_path) as (server, model):
        model.trunk.run.accumulation = 2
        first, late = (model(IDS, labels=IDS).loss for _ in range(2))
        first.backward()
        model.trunk.step()
        late.backward()
        assert None not in gradients(server, model).values()


def test_by_age(folder, tmp_path) -> None:
    with loaded(folder, tmp_path, tape_lease_s=LEASE_S) as (server, model):
        sent, transport = [], model.trunk.transport
        answered = transport.run_step
        transport.run_step = lambda message: sent.append(message) or answered(message)
        model(IDS, labels=IDS)
        until_expired(server)
        key = replace(sent[0].key, phase=Phase.BACKWARD)
        with pytest.raises(TapeExpired, match="forward again"):
            answered(RunStepMessage(key, torch.ones_like(sent[0].tensor_BTD), deadline_s=WAIT_S))
        assert set(gradients(server, model).values()) == {None}


def test_by_age_the_client_forwards_again_and_the_gradient_is_that_of_one_in_time(folder, tmp_path) -> None:
    found = []
    for how in ({}, {"tape_lease_s": LEASE_S}):
        with loaded(folder, tmp_path, **how) as (server, model):
            torch.manual_seed(3)
            loss = model(IDS, labels=IDS).loss
            if how:
                until_expired(server)
            loss.backward()
            found.append(gradients(server, model))
            assert model.trunk.run.forwarded_again == bool(how)
    assert all(torch.equal(found[1][name], each) for name, each in found[0].items())
