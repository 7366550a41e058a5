from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from splitlearn.cli.config_file import read_config, take_config, write_config
from splitlearn.cli.options import grouped, with_options_of
from splitlearn.config import Settings
from splitlearn.errors import SettingError


class Oven(Settings):
    """How hot it is."""

    degrees: int = 180
    """Celsius."""


class Kitchen(Settings):
    """What a soup is told."""

    spice: list[str]
    """Repeat it for more."""
    salt: float = 1.5
    """In grams."""
    hot: bool | None = None
    """By default as it comes."""
    oven: Oven = Oven()
    """For the bread."""


@pytest.fixture
def soup(tmp_path):
    """A verb whose options are the settings; what it was told, and what it writes down of that."""
    app = typer.Typer(add_completion=False)

    @app.command()
    @with_options_of(Kitchen)
    def verb(
        context: typer.Context,
        config: Path = typer.Option(None, callback=take_config, is_eager=True),
        **told,
    ) -> None:
        write_config(context, tmp_path / "told.yaml", leave_out={"config"})
        cooked.append(Kitchen(**grouped(Kitchen, told)))

    cooked: list[Kitchen] = []

    def cook(*words: str) -> Kitchen:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output + repr(done.exception)
        return cooked[-1]

    return cook


def written(tmp_path, text: str):
    file = tmp_path / "how.yaml"
    file.write_text(text)
    return file


def test_the_command_line_goes_before_the_file_and_the_file_before_the_default(soup, tmp_path):
    file = written(tmp_path, "spice: [cumin, dill]\nsalt: 2\nhot: no\n")
    assert soup("--config", str(file)) == Kitchen(spice=["cumin", "dill"], salt=2.0, hot=False)
    told = soup("--salt", "3", "--config", str(file), "--spice", "mint", "--hot")
    assert told == Kitchen(spice=["mint"], salt=3.0, hot=True)
    assert soup("--spice", "mint") == Kitchen(spice=["mint"])


def test_a_groups_settings_are_options_and_keys_behind_its_name(soup, tmp_path):
    assert soup("--spice", "mint", "--oven-degrees", "220") == Kitchen(spice=["mint"], oven=Oven(degrees=220))
    file = written(tmp_path, "spice: [mint]\noven_degrees: 90\n")
    assert soup("--config", str(file)).oven == Oven(degrees=90)
    assert soup("--config", str(tmp_path / "told.yaml")).oven == Oven(degrees=90)
    assert soup("--spice", "mint").oven == Oven()


def test_what_was_told_is_a_file_that_tells_the_same(soup, tmp_path):
    told = soup("--spice", "mint", "--spice", "dill", "--hot")
    assert soup("--config", str(tmp_path / "told.yaml")) == told
    assert yaml.safe_load((tmp_path / "told.yaml").read_text())["hot"] is True


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("learning-rate: 1e-4\nfiles: a.txt", {"learning_rate": "1e-4", "files": ["a.txt"]}),
        ("learning_rate: 0.1\nfiles:", {"learning_rate": "0.1"}),
        ("# nothing", {}),
    ],
)
def test_values_are_what_the_command_line_would_say(tmp_path, text, told):
    assert read_config(written(tmp_path, text), {"learning_rate": False, "files": True}) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("learning_rates: 1", "did you mean learning_rate"),
        ("learning_rate: 1\nlearning-rate: 2", "there twice"),
        ("learning_rate: {a: 1}", "no plain value"),
        ("learning_rate: [1]", "is a list"),
        ("a: b: c", "how.yaml:1: this is not YAML"),
        ("text", "no list of settings"),
    ],
)
def test_a_file_that_says_something_else_is_named(tmp_path, text, told):
    with pytest.raises(SettingError, match=told):
        read_config(written(tmp_path, text), {"learning_rate": False})


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SettingError, match="name a file that is there"):
        read_config(tmp_path / "none.yaml", {})
