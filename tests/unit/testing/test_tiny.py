from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from splitlearn.testing.tiny import (
    PROVEN,
    REFUSED,
    TINY,
    UNLISTED,
    VARIANTS,
    tiny_config,
    tiny_model,
    tiny_whole,
)


def test_every_family_is_found_by_its_name():
    assert set(TINY) == {*PROVEN, *VARIANTS, *UNLISTED, *REFUSED}


@pytest.mark.parametrize("family", [*PROVEN, *VARIANTS, *UNLISTED])
def test_a_tiny_model_has_six_layers(family: str):
    assert tiny_config(family).num_hidden_layers == 6


def test_the_same_seed_gives_the_same_weights(tmp_path: Path):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = load_file(tiny_model("llama", tmp_path / "a") / "model.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)
    again = load_file(tiny_model("llama", tmp_path / "b") / "model.safetensors")
    other = load_file(tiny_model("llama", tmp_path / "c", seed=1) / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_settings_may_be_overridden(tmp_path: Path):
    whole = tiny_whole(tiny_model("llama", tmp_path, hidden_size=64, num_hidden_layers=4))
    assert (whole.config.hidden_size, len(whole.model.layers)) == (64, 4)
    assert not whole.training
