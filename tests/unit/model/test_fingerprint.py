import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.fingerprint import Fingerprint, hash_config
from splitlearn.model.plan import SplitPlan
from splitlearn.model.weights import fingerprint
from splitlearn.testing.tiny import tiny_config, tiny_whole

PLAN = SplitPlan(6, bottom_layers=2, top_layers=2)


@pytest.fixture
def changed(folder_of, tmp_path: Path) -> Callable[..., Checkpoint]:
    """The llama folder with one tensor nudged or with other settings."""

    def change(tensor: str | None = None, **settings) -> Checkpoint:
        folder = Path(shutil.copytree(folder_of("llama"), tmp_path / "changed"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        if tensor is not None:
            tensors = load_file(folder / "model.safetensors")
            tensors[tensor] += 0.01
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return Checkpoint.open(folder)

    return change


@pytest.fixture
def original(folder_of) -> Fingerprint:
    return fingerprint(Checkpoint.open(folder_of("llama")), PLAN)


def test_a_folder_saved_again_has_the_same_fingerprint(folder_of, original: Fingerprint, tmp_path: Path):
    tiny_whole(folder_of("llama")).save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert fingerprint(Checkpoint.open(tmp_path / "again"), PLAN) == original


def test_another_training_of_the_model_differs(folder_of, original: Fingerprint):
    other = fingerprint(Checkpoint.open(folder_of("llama", 1)), PLAN)
    assert other.weights_hash != original.weights_hash
    assert other.config_hash == original.config_hash


@pytest.mark.parametrize(
    "tensor", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_one_changed_tensor_of_bottom_or_top_shows(changed, original: Fingerprint, tensor: str):
    assert fingerprint(changed(tensor), PLAN).weights_hash != original.weights_hash


def test_the_trunks_tensors_do_not_count_since_the_client_has_none(changed, original: Fingerprint):
    assert fingerprint(changed("model.layers.2.mlp.up_proj.weight"), PLAN) == original


def test_the_split_is_part_of_it(folder_of, original: Fingerprint):
    other = fingerprint(Checkpoint.open(folder_of("llama")), SplitPlan(6, 2, 1))
    assert (original.split, other.split) == ((2, 4, 6), (2, 5, 6))


@pytest.mark.parametrize(
    "settings",
    [
        {"rms_norm_eps": 1e-5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"hidden_act": "gelu"},
    ],
)
def test_settings_that_change_what_layers_do_count(changed, original: Fingerprint, settings: dict):
    assert fingerprint(changed(**settings), PLAN).config_hash != original.config_hash


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16"},
        {"transformers_version": "4.0.0"},
        {"use_cache": False},
        {"_name_or_path": "elsewhere"},
        {"eos_token_id": [2, 3]},
        {"a_field_of_the_future": 1},
    ],
)
def test_settings_that_do_not_are_passed_over(changed, original: Fingerprint, settings: dict):
    assert fingerprint(changed(**settings), PLAN) == original


def test_families_differ_by_their_settings_alone():
    names = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "gemma2"]
    assert len({hash_config(tiny_config(name)) for name in names}) == len(names)


def test_it_survives_json(original: Fingerprint):
    told = json.loads(json.dumps({"config_hash": original.config_hash, "split": original.split,
                                  "weights_hash": original.weights_hash}))  # fmt: skip
    assert Fingerprint.from_json(told) == original


def test_only_a_few_bytes_of_each_tensor_are_read(folder_of, original: Fingerprint, tmp_path: Path):
    """So a change between the sampled places goes unseen: it tells models apart, it is no seal."""
    folder = Path(shutil.copytree(folder_of("llama"), tmp_path / "changed"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"].view(-1)[20] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], tensors["lm_head.weight"])
    assert fingerprint(Checkpoint.open(folder), PLAN) == original
