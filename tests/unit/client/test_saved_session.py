"""A session's file is read as it was written, or refused with what is wrong and what to do."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, PreTrainedModel

from splitlearn.client.saved_session import NOTE
from splitlearn.errors import CheckpointError, SplitMismatch, UnsupportedCall
from splitlearn.model.plan import SplitPlan
from splitlearn.testing.loopback import split_over_loopback
from splitlearn.testing.tiny import tiny_model

IDS = torch.randint(4, 128, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with split_over_loopback(tiny_model(request.param, tmp_path_factory.mktemp("model"))) as model:
        yield model


def prompt(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    return cache


@pytest.fixture
def file(model: PreTrainedModel, tmp_path: Path) -> Path:
    model.export_session(prompt(model), tmp_path / "session")
    return tmp_path / "session"


def rewritten(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Its note and its tensors, changed."""
    with safe_open(file, "pt") as content:
        note = json.loads(content.metadata()[NOTE])
    tensors = load_file(file)
    change(note, tensors)
    save_file(tensors, file, {NOTE: json.dumps(note)})


def test_what_is_written_is_read_again(model: PreTrainedModel, file: Path) -> None:
    cache, again = prompt(model), model.import_session(file)
    with torch.no_grad():
        logits = [model(IDS[:, :3], past_key_values=each).logits for each in (cache, again)]
    assert torch.equal(*logits)


def test_a_file_can_be_imported_as_often_as_one_likes(model: PreTrainedModel, file: Path) -> None:
    first, second = (model.import_session(file) for _ in range(2))
    with torch.no_grad():
        for _ in range(2):
            model(IDS[:, :1], past_key_values=first)
    assert second.get_seq_length() == 12


def test_an_older_file_of_that_name_is_replaced_as_a_whole(model: PreTrainedModel, file: Path) -> None:
    cache = prompt(model)
    cache.crop(-2) if model.config.model_type == "llama" else cache.batch_select_indices(torch.tensor([0]))
    model.export_session(cache, file)
    again = model.import_session(file)
    assert (len(again.layers[0].keys), again.get_seq_length()) == (
        len(cache.layers[0].keys),
        cache.get_seq_length(),
    )
    assert [each.name for each in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("size", [0, 7, 300, 3000, -1])
def test_a_torn_file_is_refused(model: PreTrainedModel, file: Path, size: int) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match="no whole file of a session"):
        model.import_session(file)


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "a value": lambda note, tensors: tensors["3.keys"][0, 0, 0].neg_(),
    "a tensor's name": lambda note, tensors: tensors.update({"2.keys": tensors["3.keys"].clone()}),
    "the adapter": lambda note, tensors: note["session"]["head"]["adapter"].update(adapter="notes"),
    "the mask": lambda note, tensors: tensors["visible"].logical_not_(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_file_that_was_changed_is_refused(model: PreTrainedModel, file: Path, what: str) -> None:
    rewritten(file, CHANGES[what])
    with pytest.raises(CheckpointError, match="changed since"):
        model.import_session(file)


def test_a_newer_versions_file_is_refused_as_that(model: PreTrainedModel, file: Path) -> None:
    rewritten(file, lambda note, tensors: note.update(format=2, digest={"of": "another kind"}))
    with pytest.raises(CheckpointError, match="newer version"):
        model.import_session(file)


def test_what_is_no_session_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not there"):
        model.import_session(tmp_path / "nothing")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    (tmp_path / "text").write_text("hello")
    for name in ("weights", "text"):
        with pytest.raises(CheckpointError, match="no whole file"):
            model.import_session(tmp_path / name)


def test_a_place_that_cannot_be_written_is_said(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        model.export_session(prompt(model), tmp_path / "missing" / "session")


def test_another_cut_of_the_model_is_refused_by_its_figures(file: Path, tmp_path: Path) -> None:
    with (
        split_over_loopback(tiny_model("llama", tmp_path / "model"), SplitPlan(6, 1, 2)) as other,
        pytest.raises(SplitMismatch, match="2/2/2"),
    ):
        other.import_session(file)


def test_a_cache_that_keeps_less_than_it_was_given_is_not_exported(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    class Rounded(type(prompt(model).layers[0])):  # type: ignore[misc]
        """As the library's quantised layers do."""

    cache = prompt(model)
    cache.layers[0].__class__ = Rounded
    with pytest.raises(UnsupportedCall, match="Rounded"):
        model.export_session(cache, tmp_path / "session")
