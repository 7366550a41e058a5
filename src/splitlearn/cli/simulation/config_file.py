"""A simulation out of its YAML file; what is wrong in it is named by line and field."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # transformers depends on it
from pydantic import BaseModel, ValidationError

from splitlearn.cli.config_file import load
from splitlearn.cli.simulation.config import Simulation
from splitlearn.config import all_faults
from splitlearn.errors import SettingError

Place = Sequence[str | int]
PREFIX = "Value error, "


def read_simulation(file: Path) -> Simulation:
    """The simulation that the file describes; its paths are relative to where the command is run.

    Raises:
        SettingError: the file cannot be read, a key is not known, or a value cannot be; one sentence for
            each, which begins with `FILE:LINE: FIELD:`.
    """
    told = load(file)
    try:
        with all_faults():
            simulation = Simulation(**{str(key): value for key, value in told.items()})
    except ValidationError as error:
        root = yaml.compose(file.read_text(encoding="utf-8"))
        raise SettingError("; ".join(_line_of(file, root, fault) for fault in error.errors())) from None
    try:
        simulation.require_consistent()
    except SettingError as error:
        raise SettingError(f"{file}: {_by_keys(error.message)}") from None
    return simulation


def _line_of(file: Path, root: Any, fault: Any) -> str:
    place = fault["loc"]
    line = _node_at(root, place).start_mark.line + 1 if root is not None else 1
    return f"{file}:{line}: {'.'.join(map(str, place)) or 'the file'}: {_words_of(fault)}"


def _words_of(fault: Any) -> str:
    *parents, key = fault["loc"] or ("",)
    if fault["type"] == "extra_forbidden":
        names = _fields_of(parents)
        likely = difflib.get_close_matches(str(key), names, n=1)
        hint = f"did you mean {likely[0]}" if likely else f"there are {', '.join(names)}"
        return f"there is no such setting: {hint}"
    if fault["type"] == "missing":
        return "it is not there: add it"
    message = str(fault["msg"])
    if message.startswith(PREFIX):
        return message.removeprefix(PREFIX)
    return f"{fault['input']!r} cannot be: {message[0].lower()}{message[1:]}"


def _fields_of(place: Place) -> list[str]:
    """The settings that there are at this place."""
    kind: type[BaseModel] = Simulation
    for name in place:
        if isinstance(name, str):
            kind = _model_in(kind.model_fields[name].annotation)
    return sorted(kind.model_fields)


def _model_in(annotation: Any) -> type[BaseModel]:
    inner: type[BaseModel] = getattr(annotation, "__args__", (annotation,))[0]
    return inner


def _node_at(node: Any, place: Place) -> Any:
    """The key's node, or that of the last part of the place that is in the file."""
    found = node
    for name in place:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == str(name)), None)
            if pair is None:
                return found
            found, node = pair
        elif isinstance(node, yaml.SequenceNode) and isinstance(name, int) and name < len(node.value):
            found = node = node.value[name]
        else:
            return found
    return found


def _by_keys(message: str) -> str:
    """What an error says of an option, said of a key."""
    return re.sub(r"--([a-z][a-z-]*)", lambda option: option[1].replace("-", "_"), message)
