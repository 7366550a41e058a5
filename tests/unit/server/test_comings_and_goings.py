"""A server that stops keeps its word; one that comes back is found again; a client that left is noticed."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

from splitlearn import AutoSplitModelForCausalLM, TrunkServer
from splitlearn.errors import SessionLost, SplitLearnError, TrunkUnreachable
from splitlearn.testing import tiny_model

DEADLINE_S = 20
SLOW_S = 1.5
IDS = torch.tensor([[5, 17, 42, 8]])
SETTINGS = {"sessions": {"kv_budget_bytes": 1 << 20, "session_tokens": 64}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


@contextmanager
def connected(server: TrunkServer, folder) -> Iterator:
    model = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=server.address)
    try:
        yield model
    finally:
        model.close()


def slowed(server: TrunkServer) -> threading.Event:
    """Every forward of the trunk takes longer than the server's quiet second; set once one has begun."""
    begun, trunk = threading.Event(), server.engine.trunk
    forward = trunk.forward

    def slow(*args, **kwargs):
        begun.set()
        time.sleep(SLOW_S)
        return forward(*args, **kwargs)

    trunk.forward = slow
    return begun


def until(true) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


@pytest.mark.parametrize("use_cache", [True, False], ids=["with cache", "without"])
def test_a_step_that_runs_when_the_server_is_stopped_is_answered(folder, use_cache):
    with TrunkServer(folder, port=0, **SETTINGS) as server, connected(server, folder) as model:
        begun, answers = slowed(server), []

        def ask() -> None:
            try:
                with torch.no_grad():
                    answers.append(model(IDS, use_cache=use_cache).logits)
            except SplitLearnError as error:
                answers.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        assert begun.wait(DEADLINE_S)
        server.stop()
        asking.join(DEADLINE_S)
        assert isinstance(answers[0], torch.Tensor), answers[0]


def test_a_server_that_is_started_again_is_found_again(folder):
    with TrunkServer(folder, port=0, **SETTINGS) as server:
        port = int(server.address.rpartition(":")[2])
        model = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=server.address)
        expected = model.generate(IDS, max_new_tokens=5, do_sample=False)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(IDS, past_key_values=cache)
    with pytest.raises(TrunkUnreachable):
        model.generate(IDS, max_new_tokens=5, do_sample=False)
    with TrunkServer(folder, port=port, **SETTINGS):
        assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), expected)
        with pytest.raises(SessionLost, match="from the prompt"), torch.no_grad():
            model(IDS[:, :1], past_key_values=cache)
        model.close()


def test_a_client_that_is_gone_loses_its_sessions_soon(folder):
    sessions = SETTINGS["sessions"] | {"orphan_lease_s": 0.1}
    with TrunkServer(folder, port=0, sessions=sessions) as server:
        model = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=server.address)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(IDS, past_key_values=cache)
        assert server.engine.open_sessions == 1
        for stream in model.trunk.transport._streams.values():
            stream.cancel()
        assert until(lambda: server.engine.open_sessions == 0)
        model.close()


def test_a_model_that_is_closed_stays_closed(folder):
    with TrunkServer(folder, port=0, **SETTINGS) as server, connected(server, folder) as model:
        model.close()
        with pytest.raises(TrunkUnreachable, match="load the model again"):
            model(IDS)


def test_a_client_that_does_not_read_is_not_read(folder):
    """It may have so many steps open and no more; what it sends beyond them waits on its own side."""
    settings = SETTINGS | {"max_unanswered": 2}
    with TrunkServer(folder, port=0, **settings) as server, connected(server, folder) as model:
        begun = slowed(server)
        waiting = [threading.Thread(target=lambda: model(IDS, use_cache=False)) for _ in range(4)]
        for thread in waiting:
            thread.start()
        assert begun.wait(DEADLINE_S)
        time.sleep(SLOW_S / 3)
        assert max(stream.owed for stream in server._hall.streams) == 2
        for thread in waiting:
            thread.join(DEADLINE_S)
