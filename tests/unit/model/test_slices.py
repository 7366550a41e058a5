import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitlearn.errors import CheckpointError
from splitlearn.model import slices
from splitlearn.model.checkpoint import INDEX_FILE, Checkpoint
from splitlearn.model.plan import SplitPlan
from splitlearn.model.slices import write_slice
from splitlearn.model.weights import fingerprint, load_client, load_trunk

PLAN = SplitPlan(6, bottom_layers=2, top_layers=2)


@pytest.fixture
def sliced(folder_of, tmp_path: Path) -> Callable[..., Checkpoint]:
    """A family's client or trunk slice, opened."""

    def slice_of(family: str, part: str, **how) -> Checkpoint:
        whole = Checkpoint.open(folder_of(family))
        return Checkpoint.open(write_slice(whole, PLAN, part, tmp_path / part, **how))

    return slice_of


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "llama(tied)", "gpt2", "mixtral", "gemma3_text", "bloom"])
def test_two_slices_are_the_whole_model(sliced, loaded_of, in_process, family: str, ids: Tensor):
    trunk = in_process(load_trunk(sliced(family, "trunk"), PLAN))
    client = load_client(sliced(family, "client"), PLAN, lambda: trunk)
    whole = loaded_of(family).whole
    assert torch.equal(client(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


def test_each_slice_holds_its_own_tensors_and_no_other(sliced, folder_of):
    whole = Checkpoint.open(folder_of("llama"))
    for part in ("client", "trunk"):
        assert sliced("llama", part).keys == whole.keys_of(part, PLAN)


@pytest.mark.parametrize("part", ["client", "trunk"])
def test_a_slice_has_the_fingerprint_of_its_model(sliced, folder_of, part: str):
    whole = Checkpoint.open(folder_of("llama"))
    assert fingerprint(sliced("llama", part), PLAN) == fingerprint(whole, PLAN)


def test_large_slices_are_sharded(sliced, folder_of, ids: Tensor):
    whole = Checkpoint.open(folder_of("llama"))
    client = sliced("llama", "client", shard_bytes=20_000)
    index = json.loads((Path(client.source) / INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) > 3
    ours, theirs = client.read(client.keys), whole.read(client.keys)
    assert all(torch.equal(ours[key], theirs[key]) for key in client.keys)


def test_the_client_gets_the_tokenizer_and_the_trunk_does_not(folder_of, tmp_path: Path):
    whole = Checkpoint.open(folder_of("llama"))
    tokenizer = Path(whole.source) / "tokenizer.json"
    tokenizer.write_text("{}")
    try:
        client = write_slice(whole, PLAN, "client", tmp_path / "client")
        trunk = write_slice(whole, PLAN, "trunk", tmp_path / "trunk")
    finally:
        tokenizer.unlink()
    files = {folder: {path.name for path in folder.iterdir()} for folder in (client, trunk)}
    both = {"config.json", "model.safetensors", "splitlearn.json"}
    assert files[client] == both | {"tokenizer.json", "generation_config.json"}
    assert files[trunk] == both


def test_a_slice_of_the_other_side_is_refused(sliced, in_process):
    with pytest.raises(CheckpointError, match="holds the client's slice of a model, not the trunk's"):
        load_trunk(sliced("llama", "client"), PLAN)
    with pytest.raises(CheckpointError, match="holds the trunk's slice of a model, not the client's"):
        load_client(sliced("llama", "trunk"), PLAN, torch.nn.Identity)


@pytest.mark.parametrize("part", ["client", "trunk"])
def test_a_slice_of_another_split_is_refused(sliced, part: str):
    checkpoint, other = sliced("llama", part), SplitPlan(6, 1, 2)
    with pytest.raises(CheckpointError, match=r"is cut 2/2/2.*asked for is 1/3/2"):
        load_trunk(checkpoint, other) if part == "trunk" else load_client(
            checkpoint, other, torch.nn.Identity
        )
    with pytest.raises(CheckpointError, match="is cut 2/2/2"):
        fingerprint(checkpoint, other)


def test_a_slice_can_be_sliced_again_but_not_to_the_other_side(sliced, tmp_path: Path):
    client = sliced("llama", "client")
    again = write_slice(client, PLAN, "client", tmp_path / "again")
    assert Checkpoint.open(again).keys == client.keys
    with pytest.raises(CheckpointError, match="not the trunk's"):
        write_slice(client, PLAN, "trunk", tmp_path / "other")


def test_a_folder_with_something_in_it_is_not_overwritten(folder_of, tmp_path: Path):
    whole = Checkpoint.open(folder_of("llama"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        write_slice(whole, PLAN, "client", tmp_path)
    (tmp_path / "empty").mkdir()
    assert write_slice(whole, PLAN, "client", tmp_path / "empty") == tmp_path / "empty"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_slice_that_fails_half_way_leaves_nothing(
    folder_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full_disk(*args, **kwargs) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(slices, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        write_slice(Checkpoint.open(folder_of("llama")), PLAN, "client", tmp_path / "client")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoilt", ["{", "{}", '{"format": 99}'])
def test_a_note_that_cannot_be_read_is_refused(sliced, spoilt: str):
    folder = Path(sliced("llama", "trunk").source)
    (folder / "splitlearn.json").write_text(spoilt)
    with pytest.raises(CheckpointError, match="slice the whole model again"):
        Checkpoint.open(folder)
