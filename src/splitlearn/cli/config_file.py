"""A YAML file that says what the command line does not; its keys are the options' names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
import yaml  # type: ignore[import-untyped]  # transformers depends on it

from splitlearn.errors import SettingError

NOT_IN_A_FILE = {"config", "help"}


def take_config(context: typer.Context, file: Path | None) -> Path | None:
    """An eager option's callback: what the file says is the other options' default.

    Raises:
        SettingError: the file cannot be read, or has a key that is no option of this verb.
    """
    if file is not None:
        context.default_map = read_config(file, _options_of(context))
    return file


def read_config(file: Path, options: dict[str, bool]) -> dict[str, Any]:
    """The file's values as they would be written on the command line, by the options' names.

    Args:
        options: each option's name, and whether it may be given several times.

    Raises:
        SettingError: the file cannot be read, or does not say what an option says.
    """
    told = load(file)
    found: dict[str, Any] = {}
    for key, value in told.items():
        name = str(key).replace("-", "_")
        if name not in options:
            likely = difflib.get_close_matches(name, options, n=1)
            hint = f"did you mean {likely[0]}" if likely else f"it may have {', '.join(sorted(options))}"
            raise SettingError(f"{file}: there is no setting {key}: {hint}")
        if name in found:
            raise SettingError(f"{file}: {name} is there twice: leave one out")
        if value is not None:
            found[name] = _written(file, key, value, several=options[name])
    return found


def write_config(
    context: typer.Context, file: Path, leave_out: set[str], decided: Mapping[str, Any] | None = None
) -> None:
    """What this command was told, as a file that another one takes; what was `decided` goes before it."""
    whole = context.params | dict(decided or {})
    told = {name: _plain(value) for name, value in whole.items() if name not in leave_out}
    kept = {name: value for name, value in told.items() if value not in (None, [])}
    file.write_text(yaml.safe_dump(kept, sort_keys=False))


def _options_of(context: typer.Context) -> dict[str, bool]:
    return {
        each.name: bool(getattr(each, "multiple", False))
        for each in context.command.params
        if each.name and each.name not in NOT_IN_A_FILE
    }


def load(file: Path) -> dict[Any, Any]:
    """The mapping in a YAML file; raises SettingError where it cannot be read, or has something else."""
    try:
        told = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"{file}: cannot be read ({error.strerror}): name a file that is there") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        problem = getattr(error, "problem", None) or "not a text in UTF-8"
        raise SettingError(f"{where}: this is not YAML ({problem}): write `name: value` lines") from None
    if told is None:
        return {}
    if not isinstance(told, dict):
        raise SettingError(f"{file}: this is no list of settings: write `name: value` lines")
    return told


def _written(file: Path, key: Any, value: Any, *, several: bool) -> Any:
    values = value if isinstance(value, list) else [value]
    if not several and isinstance(value, list):
        raise SettingError(f"{file}: {key} is a list: it takes one value")
    if not all(isinstance(each, str | int | float) for each in values):
        raise SettingError(f"{file}: {key} is no plain value: write a text, a number, or true or false")
    # As text, because a number of another kind would be cut to fit: 8.5 to 8.
    return [str(each) for each in values] if several else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)
