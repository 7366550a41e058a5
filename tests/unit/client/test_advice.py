"""Where the server is gone, what to do fits what was being done: generating, or training."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from peft import LoraConfig
from transformers import DynamicCache

from splitlearn import AutoSplitModelForCausalLM, TrunkServer
from splitlearn.client.grpc_errors import error_of
from splitlearn.errors import TrunkUnreachable
from splitlearn.testing.tiny import tiny_model

IDS = torch.tensor([[5, 17, 42]])
Loaded = Callable[..., Any]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TrunkServer]:
    folder = tiny_model("llama", tmp_path / "model")
    sessions = {"session_tokens": 64, "kv_budget_bytes": 1 << 20}
    state = tmp_path / "state"
    with TrunkServer(
        folder, port=0, device="cpu", sessions=sessions, state_dir=state, drain_s=0.1
    ) as running:
        yield running


@pytest.fixture
def loaded(server: TrunkServer) -> Iterator[Loaded]:
    models: list[Any] = []

    def load(**how: Any) -> Any:
        models.append(
            AutoSplitModelForCausalLM.from_pretrained(server.config.model, trunk=server.address, **how)
        )
        return models[-1]

    yield load
    for model in models:
        model.close()


def test_who_trains_is_told_to_resume(server, loaded) -> None:
    model = loaded(lora=LoraConfig(r=2, target_modules=["q_proj"]))
    model(IDS, labels=IDS).loss.backward()
    model.trunk.step()
    server.stop()
    with pytest.raises(TrunkUnreachable, match="resume_from_checkpoint=True") as gone:
        model(IDS, labels=IDS)
    assert "enerate" not in gone.value.message


def test_who_generates_is_told_to_generate_again(server, loaded) -> None:
    model = loaded().eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        server.stop()
        with pytest.raises(TrunkUnreachable, match="generate again from the prompt") as gone:
            model(IDS[:, :1], past_key_values=cache)
    assert "resume" not in gone.value.message


class Broken(grpc.RpcError):
    """As gRPC reports a connection that was cut."""

    def trailing_metadata(self) -> tuple[()]:
        return ()

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "Socket closed"


def test_a_connection_that_broke_says_nothing_of_what_it_was_for() -> None:
    said = error_of(Broken(), "here:1", connected=True).message
    assert "here:1 broke (Socket closed)" in said
    assert "enerate" not in said
