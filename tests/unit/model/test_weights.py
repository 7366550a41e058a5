import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from splitlearn.errors import CheckpointError, SettingError
from splitlearn.model import checkpoint as checkpoint_module
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.plan import SplitPlan
from splitlearn.model.weights import load_client, load_trunk, resolve_dtype
from splitlearn.testing.tiny import tiny_whole

PLAN = SplitPlan(6, bottom_layers=2, top_layers=2)
WEIGHTS = "model.safetensors"


@pytest.fixture
def rewritten(folder_of, tmp_path: Path) -> Callable[..., Path]:
    """A family's folder, its tensors changed by a function."""

    def rewrite(family: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
        folder = Path(shutil.copytree(folder_of(family), tmp_path / family))
        tensors = change(load_file(folder / WEIGHTS))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        return folder

    return rewrite


def _assert_split_is_whole(folder: Path, whole: nn.Module, in_process, ids: Tensor) -> None:
    checkpoint = Checkpoint.open(folder)
    trunk = in_process(load_trunk(checkpoint, PLAN))
    client = load_client(checkpoint, PLAN, lambda: trunk)
    with torch.inference_mode():
        ours, theirs = client(ids, use_cache=False).logits, whole(ids, use_cache=False).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_each_side_opens_its_own_tensors_and_no_other(
    folder_of, in_process, monkeypatch: pytest.MonkeyPatch, family: str
):
    checkpoint = Checkpoint.open(folder_of(family))
    opened: list[str] = []
    really_open = checkpoint_module.safe_open

    def spying_open(*args, **kwargs):
        file = really_open(*args, **kwargs)
        return _Spy(file, opened)

    monkeypatch.setattr(checkpoint_module, "safe_open", spying_open)
    trunk = load_trunk(checkpoint, PLAN)
    assert sorted(opened) == checkpoint.keys_of("trunk", PLAN)
    opened.clear()
    load_client(checkpoint, PLAN, lambda: in_process(trunk))
    assert sorted(opened) == checkpoint.keys_of("client", PLAN)


class _Spy:
    def __init__(self, file, opened: list[str]) -> None:
        self.file, self.opened = file, opened

    def __enter__(self) -> "_Spy":
        return self

    def __exit__(self, *error) -> None:
        self.file.__exit__(*error)

    def get_slice(self, name: str):
        self.opened.append(name)
        return self.file.get_slice(name)


def test_no_weight_of_the_other_side_is_in_memory(loaded_of, in_process):
    loaded = loaded_of("llama")
    client = load_client(loaded.checkpoint, PLAN, lambda: in_process(loaded.trunk))
    count = [
        sum(each.numel() for each in model.parameters()) for model in (loaded.whole, client, loaded.trunk)
    ]
    assert count[0] == count[1] + count[2]
    assert not any(each.is_meta for each in (*client.parameters(), *client.buffers()))
    assert not any(each.is_meta for each in (*loaded.trunk.parameters(), *loaded.trunk.buffers()))


def test_a_sharded_folder_loads_the_same(loaded_of, in_process, tmp_path: Path, ids: Tensor):
    whole = loaded_of("llama").whole
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    _assert_split_is_whole(tmp_path / "sharded", whole, in_process, ids)


def test_tied_embeddings_stay_tied_at_the_client(loaded_of, in_process):
    loaded = loaded_of("llama(tied)")
    assert "lm_head.weight" not in loaded.checkpoint.keys
    client = load_client(loaded.checkpoint, PLAN, lambda: in_process(loaded.trunk))
    assert client.lm_head.weight is client.model.embed_tokens.weight


def _expert_by_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that mixtral's first checkpoints use, whatever the library saves today."""
    old: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".mlp.experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                stem = name.replace("mlp.experts.gate_up_proj", f"block_sparse_moe.experts.{expert}")
                old[f"{stem}.w1.weight"], old[f"{stem}.w3.weight"] = both.chunk(2)
        elif name.endswith(".mlp.experts.down_proj"):
            for expert, one in enumerate(tensor):
                stem = name.replace("mlp.experts.down_proj", f"block_sparse_moe.experts.{expert}")
                old[f"{stem}.w2.weight"] = one
        else:
            old[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tensor
    return old


def test_experts_saved_one_by_one_are_fused(loaded_of, rewritten, in_process, ids: Tensor):
    folder = rewritten("mixtral", _expert_by_expert)
    keys = Checkpoint.open(folder).keys
    assert "model.layers.2.block_sparse_moe.experts.3.w1.weight" in keys
    assert not any("gate_up_proj" in key for key in keys)
    _assert_split_is_whole(folder, loaded_of("mixtral").whole, in_process, ids)


def _fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    fused: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".block_sparse_moe.experts." not in name:
            fused[name.replace(".block_sparse_moe.gate.", ".mlp.gate.")] = tensor
    for layer in range(6):
        stem = f"model.layers.{layer}.block_sparse_moe.experts"
        expert = [[tensors[f"{stem}.{e}.w{w}.weight"] for e in range(4)] for w in (1, 2, 3)]
        both = [torch.cat(pair) for pair in zip(expert[0], expert[2], strict=True)]
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(both)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(expert[1])
    return fused


def test_experts_saved_fused_load_too(loaded_of, rewritten, in_process, ids: Tensor):
    def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if any("gate_up_proj" in name for name in tensors) else _fused(tensors)

    folder = rewritten("mixtral", fused)
    assert "model.layers.2.mlp.experts.gate_up_proj" in Checkpoint.open(folder).keys
    _assert_split_is_whole(folder, loaded_of("mixtral").whole, in_process, ids)


def test_names_without_the_base_models_prefix_load_too(loaded_of, rewritten, in_process, ids: Tensor):
    """As the first gpt2 is on the hub, with masks among its tensors."""

    def first_gpt2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 4, 4) for layer in range(6)}
        return old | masks

    folder = rewritten("gpt2", first_gpt2)
    assert "h.0.ln_1.weight" in Checkpoint.open(folder).keys
    _assert_split_is_whole(folder, loaded_of("gpt2").whole, in_process, ids)


def test_rotary_tables_of_old_checkpoints_are_passed_over(loaded_of, rewritten, in_process, ids: Tensor):
    def with_tables(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tables = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(6)}
        return tensors | tables

    folder = rewritten("llama", with_tables)
    _assert_split_is_whole(folder, loaded_of("llama").whole, in_process, ids)


def test_layers_for_predicting_further_tokens_are_left_alone(loaded_of, rewritten, in_process, ids: Tensor):
    folder = rewritten(
        "deepseek_v3", lambda tensors: tensors | {"model.layers.6.eh_proj.weight": torch.ones(2)}
    )
    _assert_split_is_whole(folder, loaded_of("deepseek_v3").whole, in_process, ids)


@pytest.mark.parametrize(
    ("key", "side"),
    [("model.layers.3.mlp.up_proj.weight", "trunk"), ("model.norm.weight", "client")],
)
def test_a_missing_tensor_is_an_error_and_never_random(rewritten, in_process, key: str, side: str):
    folder = rewritten("llama", lambda tensors: {k: v for k, v in tensors.items() if k != key})
    checkpoint = Checkpoint.open(folder)
    other = {
        "trunk": lambda: load_trunk(checkpoint, PLAN),
        "client": lambda: load_client(checkpoint, PLAN, nn.Identity),
    }
    with pytest.raises(CheckpointError, match=f"for the {side}: it lacks {key}"):
        other.pop(side)()
    next(iter(other.values()))()


def test_a_tensor_too_many_is_an_error(rewritten):
    folder = rewritten("llama", lambda tensors: tensors | {"model.layers.2.odd.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"has too much model\.layers\.2\.odd\.weight"):
        load_trunk(Checkpoint.open(folder), PLAN)


def test_a_tensor_of_another_shape_is_an_error(rewritten):
    key = "model.layers.2.mlp.up_proj.weight"
    folder = rewritten("llama", lambda tensors: tensors | {key: torch.ones(3, 3)})
    with pytest.raises(CheckpointError, match=f"has another shape for {key}"):
        load_trunk(Checkpoint.open(folder), PLAN)


def test_a_missing_expert_is_an_error(rewritten):
    key = "model.layers.2.block_sparse_moe.experts.1.w2.weight"
    folder = rewritten(
        "mixtral", lambda tensors: {k: v for k, v in _expert_by_expert(tensors).items() if k != key}
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.experts\.down_proj"):
        load_trunk(Checkpoint.open(folder), PLAN)


def test_dtype_is_the_checkpoints_or_the_one_asked_for(folder_of, tmp_path: Path):
    checkpoint = Checkpoint.open(folder_of("llama"))
    assert resolve_dtype("auto", checkpoint) == torch.float32
    assert resolve_dtype("bfloat16", checkpoint) == torch.bfloat16
    assert load_trunk(checkpoint, PLAN, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(SettingError, match="'int8' is not known"):
        resolve_dtype("int8", checkpoint)

    silent = Path(shutil.copytree(folder_of("llama"), tmp_path / "silent"))
    config = json.loads((silent / "config.json").read_text())
    (silent / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    halves = {name: tensor.half() for name, tensor in load_file(silent / WEIGHTS).items()}
    save_file(halves, silent / WEIGHTS)
    assert (
        resolve_dtype("auto", Checkpoint.open(silent))
        == tiny_whole(silent, dtype="auto").dtype
        == torch.float16
    )


def test_the_clients_model_generates_as_its_folder_says(folder_of, tmp_path: Path):
    folder = Path(shutil.copytree(folder_of("llama"), tmp_path / "llama"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.6}))
    client = load_client(Checkpoint.open(folder), PLAN, nn.Identity)
    assert client.generation_config.eos_token_id == [2, 7]
    assert client.name_or_path == str(folder)


def test_loading_prints_nothing(folder_of, capfd: pytest.CaptureFixture):
    load_trunk(Checkpoint.open(folder_of("llama")), PLAN)
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3_text", "opt", "bloom", "gptj"])
def test_both_sides_load_onto_a_gpu(folder_of, in_process, family: str, ids: Tensor):
    checkpoint, gpu = Checkpoint.open(folder_of(family)), torch.device("cuda", 0)
    trunk = in_process(load_trunk(checkpoint, PLAN, device="cuda"))
    client = load_client(checkpoint, PLAN, lambda: trunk, device=gpu)
    for model in (trunk.segment, client):
        assert {each.device for each in (*model.parameters(), *model.buffers())} == {gpu}
    whole = tiny_whole(folder_of(family)).to(gpu)
    ours, theirs = client(ids.to(gpu), use_cache=False).logits, whole(ids.to(gpu), use_cache=False).logits
    assert torch.equal(ours, theirs)
    assert load_trunk(checkpoint, PLAN, "bfloat16", gpu).dtype == torch.bfloat16
