from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from splitlearn.config import SessionConfig
from splitlearn.errors import KvBudgetExceeded
from splitlearn.model.plan import SplitPlan
from splitlearn.testing import lively_model, split_over_loopback, tiny_whole

IDS = torch.randint(4, 128, (2, 9), generator=torch.Generator().manual_seed(1))
TEXT = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6, "attention_mask": torch.ones_like(IDS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_model("llama", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("plan", [None, SplitPlan(6, 1, 3)])
def test_a_split_model_without_a_network_writes_the_whole_models_text(
    folder: Path, plan: SplitPlan | None
) -> None:
    whole = tiny_whole(folder)
    with split_over_loopback(folder, plan) as split:
        for how in ({}, {"num_beams": 3}, {"use_cache": False}):
            asked = TEXT | how
            assert torch.equal(split.generate(IDS, **asked), whole.generate(IDS, **asked))
        assert split.trunk.transport.traffic.tensor_bytes > 0


def test_what_the_trunk_gave_belongs_to_the_client(folder: Path) -> None:
    """The engine works in inference mode; its tensors may not be written to, or trained on."""
    with split_over_loopback(folder) as split, torch.no_grad():
        hidden = split.model(IDS, past_key_values=DynamicCache(config=split.config)).last_hidden_state
        assert not hidden.is_inference()


def test_an_error_of_the_engine_is_raised_here(folder: Path) -> None:
    sessions = SessionConfig(session_tokens=32, kv_budget_bytes=20_000)
    with split_over_loopback(folder, sessions=sessions) as split, pytest.raises(KvBudgetExceeded):
        split.generate(IDS, **(TEXT | {"num_beams": 8}))
