"""Client and trunk attend alike, or the user is told."""

import warnings

import pytest

from splitlearn import AutoSplitModelForCausalLM, TrunkServer
from splitlearn.errors import SettingError
from splitlearn.testing import tiny_model

SETTINGS = {"port": 0, "sessions": {"kv_budget_bytes": 1 << 20, "session_tokens": 64}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


def test_another_attention_at_the_trunk_is_said_with_what_to_do(folder):
    with TrunkServer(folder, attention="eager", **SETTINGS) as server:
        with pytest.warns(UserWarning, match="attn_implementation='eager' here"):
            AutoSplitModelForCausalLM.from_pretrained(folder, trunk=server.address).close()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = AutoSplitModelForCausalLM.from_pretrained(
                folder, trunk=server.address, attn_implementation="eager"
            )
        model.close()


def test_what_is_not_possible_here_is_refused_before_anything_listens(folder):
    with pytest.raises(SettingError, match="it needs a CUDA device"):
        TrunkServer(folder, attention="flash", device="cpu", **SETTINGS).start()
