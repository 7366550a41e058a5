import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitlearn.errors import CheckpointError, UnsupportedModel
from splitlearn.model import checkpoint as checkpoint_module
from splitlearn.model.checkpoint import INDEX_FILE, Checkpoint, part_of
from splitlearn.model.plan import SplitPlan
from splitlearn.testing.tiny import tiny_whole

PLAN = SplitPlan(6, bottom_layers=2, top_layers=2)


@pytest.fixture
def copied(folder_of, tmp_path: Path) -> Path:
    """A folder that a test may spoil."""
    return Path(shutil.copytree(folder_of("llama"), tmp_path / "llama"))


@pytest.fixture
def sharded(folder_of, tmp_path: Path) -> Path:
    tiny_whole(folder_of("llama")).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        ("model.layers.", ".self_attn.q_proj.weight"),
        ("transformer.h.", ".attn.c_attn.weight"),
        ("h.", ".attn.c_attn.weight"),
        ("gpt_neox.layers.", ".attention.query_key_value.weight"),
        ("transformer.blocks.", ".attn.Wqkv.weight"),
        ("model.decoder.layers.", ".self_attn.q_proj.weight"),
        ("model.layers.", ".block_sparse_moe.experts.5.w1.weight"),
    ],
)
def test_a_tensors_part_is_told_by_the_layer_in_its_name(prefix: str, suffix: str):
    parts = [part_of(f"{prefix}{index}{suffix}", PLAN) for index in (0, 1, 2, 3, 4, 5)]
    assert parts == ["bottom", "bottom", "trunk", "trunk", "top", "top"]


def test_what_is_in_no_layer_stays_with_the_client():
    before = ["model.embed_tokens.weight", "wte.weight", "transformer.wpe.weight", "word_embeddings.weight"]
    after = ["lm_head.weight", "model.norm.weight", "ln_f.bias", "gpt_neox.final_layer_norm.weight"]
    assert {part_of(key, PLAN) for key in before} == {"bottom"}
    assert {part_of(key, PLAN) for key in after} == {"top"}


def test_layers_beyond_the_last_belong_to_nobody():
    """For example those of deepseek_v3 that predict further tokens."""
    assert part_of("model.layers.6.eh_proj.weight", PLAN) == "unused"


def test_every_tensor_belongs_to_one_side(folder_of):
    opened = Checkpoint.open(folder_of("mixtral"))
    client, trunk = opened.keys_of("client", PLAN), opened.keys_of("trunk", PLAN)
    assert sorted(client + trunk) == opened.keys
    assert all(opened.part_of(key, PLAN) == "trunk" for key in trunk)


def test_reading_opens_only_what_is_asked_for(folder_of, monkeypatch: pytest.MonkeyPatch):
    opened = Checkpoint.open(folder_of("llama"))
    touched = spy_on_tensors(monkeypatch)
    wanted = opened.keys_of("trunk", PLAN)
    tensors = opened.read(wanted)
    assert sorted(touched) == sorted(tensors) == sorted(wanted)
    whole = load_file(folder_of("llama") / "model.safetensors")
    assert all(torch.equal(tensors[key], whole[key]) for key in wanted)


def spy_on_tensors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each tensor that is opened from now on."""
    touched: list[str] = []
    really_open = checkpoint_module.safe_open

    class Spy:
        def __init__(self, *args, **kwargs) -> None:
            self.file = really_open(*args, **kwargs)

        def __enter__(self) -> "Spy":
            self.file.__enter__()
            return self

        def __exit__(self, *error) -> None:
            self.file.__exit__(*error)

        def get_tensor(self, name: str):
            touched.append(name)
            return self.file.get_tensor(name)

        def get_slice(self, name: str):
            touched.append(name)
            return self.file.get_slice(name)

    monkeypatch.setattr(checkpoint_module, "safe_open", Spy)
    return touched


def test_a_sharded_folder_is_read_by_its_index(folder_of, sharded: Path):
    opened = Checkpoint.open(sharded)
    assert len(set(opened.files.values())) > 2
    assert opened.keys == Checkpoint.open(folder_of("llama")).keys
    tensors = opened.read(opened.keys)
    assert torch.equal(tensors["lm_head.weight"], tiny_whole(sharded).lm_head.weight)


def test_only_the_shards_that_are_needed_have_to_be_there(sharded: Path):
    opened = Checkpoint.open(sharded)
    needed = {opened.files[key] for key in opened.keys_of("trunk", PLAN)}
    others = set(opened.files.values()) - needed
    assert others
    for name in others:
        (sharded / name).unlink()
    assert Checkpoint.open(sharded).read(opened.keys_of("trunk", PLAN))
    with pytest.raises(CheckpointError, match=r"lacks model-.*; download"):
        opened.read(opened.keys_of("client", PLAN))


def test_a_file_that_was_cut_short_is_refused(copied: Path):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Checkpoint.open(copied)


@pytest.mark.parametrize("content", [b"", b"\x01", b"pickled weights, not safetensors at all"])
def test_a_file_of_another_kind_is_refused(copied: Path, content: bytes):
    (copied / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Checkpoint.open(copied)


def test_an_index_that_names_what_is_not_there_is_refused(sharded: Path):
    index = json.loads((sharded / INDEX_FILE).read_text())
    some_shard = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.layers.2.invented.weight"] = some_shard
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\.invented"):
        Checkpoint.open(sharded).entries(["model.layers.2.invented.weight"])
    (sharded / INDEX_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pytorch_model.bin", "nothing pickled is opened"),
        ("model-q4.gguf", "GGUF files"),
        (None, r"has no model\.safetensors"),
    ],
)
def test_a_folder_without_safetensors_is_told_what_to_do(copied: Path, name: str | None, reason: str):
    (copied / "model.safetensors").unlink()
    if name:
        (copied / name).write_bytes(b"weights")
    with pytest.raises(CheckpointError, match=f"{reason}.*save_pretrained it as safetensors"):
        Checkpoint.open(copied)


def test_a_folder_that_is_not_there_or_no_models_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"lacks config\.json"):
        Checkpoint.open(tmp_path)


def test_a_hub_id_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CheckpointError, match=r"no folder here, and as a hub id cannot be read") as refused:
        Checkpoint.open("nobody/no-model")
    assert "\n" not in refused.value.message


def test_a_model_with_code_of_its_own_is_refused(copied: Path):
    config = json.loads((copied / "config.json").read_text())
    own = {"model_type": "inhouse", "auto_map": {"AutoConfig": "configuration_inhouse.InhouseConfig"}}
    (copied / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(UnsupportedModel, match="code of its own"):
        Checkpoint.open(copied)


def test_a_refused_family_is_refused_before_its_weights(copied: Path):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "model.safetensors").write_bytes(b"never looked at")
    with pytest.raises(UnsupportedModel, match="quantised"):
        Checkpoint.open(copied)


def test_the_files_of_a_hub_model_are_of_the_configurations_commit(
    folder_of, monkeypatch: pytest.MonkeyPatch
):
    """The hub is played by a folder: which files are asked for, at which revision."""
    asked: list[tuple[str, str | None]] = []
    folder = folder_of("llama")

    def fetched(source: str, name: str, *, revision: str | None, **how) -> str | None:
        asked.append((name, revision))
        return str(folder / name) if (folder / name).is_file() else None

    def configured(source: str, **how):
        config = Checkpoint.open(folder).config
        config._commit_hash = "abc"
        return config

    monkeypatch.setattr(checkpoint_module, "cached_file", fetched)
    opened_config = configured("")
    monkeypatch.setattr(checkpoint_module, "_read_config", lambda *_: opened_config)
    opened = Checkpoint.open("someone/llama", revision="main")
    opened.read(opened.keys_of("trunk", PLAN))
    assert {revision for _, revision in asked} == {"abc"}
    assert ("model.safetensors", "abc") in asked


def test_hub_shards_are_fetched_only_when_they_are_needed(sharded: Path, monkeypatch: pytest.MonkeyPatch):
    fetched: list[str] = []

    def fetch(source: str, name: str, **how) -> str | None:
        fetched.append(name)
        return str(sharded / name) if (sharded / name).is_file() else None

    local = Checkpoint.open(sharded)
    monkeypatch.setattr(checkpoint_module, "cached_file", fetch)
    monkeypatch.setattr(checkpoint_module, "_read_config", lambda *_: local.config)
    opened = Checkpoint.open("someone/llama")
    assert not [name for name in fetched if name.startswith("model-")]
    wanted = opened.keys_of("trunk", PLAN)
    opened.read(wanted)
    shards = {name for name in fetched if name.startswith("model-")}
    assert shards == {opened.files[key] for key in wanted} < set(opened.files.values())


def test_tensors_may_be_of_any_dtype(tmp_path: Path, folder_of):
    folder = Path(shutil.copytree(folder_of("llama"), tmp_path / "half"))
    tensors = load_file(folder / "model.safetensors")
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    opened = Checkpoint.open(folder)
    assert {tensor.dtype for tensor in opened.read(opened.keys).values()} == {torch.bfloat16}
    assert {entry.dtype for _, entry in opened.entries(opened.keys).values()} == {"BF16"}
