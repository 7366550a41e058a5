"""What the user's files say: each line is one example, or is named as wrong."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn.errors import DataError

Files = str | Path | Sequence[str | Path]
ASSISTANT = "assistant"
TELL_ONE = "give it `text`, or `prompt` and `completion`, or `messages`, and no two of them"


@dataclass(frozen=True, slots=True)
class Text:
    """All of it is learned."""

    where: str
    """FILE:LINE, as errors name it."""
    text: str

    def __post_init__(self) -> None:
        require_text(self.where, "text", self.text)


@dataclass(frozen=True, slots=True)
class Completion:
    """The completion is learned, as what follows the prompt; no space is put in between."""

    where: str
    prompt: str
    completion: str

    def __post_init__(self) -> None:
        require_text(self.where, "prompt", self.prompt)
        require_text(self.where, "completion", self.completion)


@dataclass(frozen=True, slots=True)
class Chat:
    """The assistant's turns are learned; the last message is one.

    Messages may have more than `role` and `content`: the chat template sees all of it.
    """

    where: str
    messages: list[dict[str, Any]]

    def __post_init__(self) -> None:
        if not isinstance(self.messages, list):
            raise DataError(
                f"{self.where}: messages is {kind_of(self.messages)}: make it a list of objects "
                "with role and content"
            )
        for index, message in enumerate(self.messages):
            _require_message(self.where, f"messages[{index}]", message)
        if len(self.messages) < 2 or self.messages[-1]["role"] != ASSISTANT:
            raise DataError(
                f"{self.where}: messages does not end with an {ASSISTANT}'s answer to what is before it: "
                "add the answer, or delete what comes after it"
            )


@dataclass(frozen=True, slots=True)
class Document:
    """A whole plain file: all of it is learned, in blocks."""

    where: str
    text: str

    def __post_init__(self) -> None:
        require_text(self.where, "the file", self.text)


OfLine = Text | Completion | Chat
Example = OfLine | Document
KINDS = {("text",): Text, ("prompt", "completion"): Completion, ("messages",): Chat}
KEYS = [key for keys in KINDS for key in keys]


@dataclass(frozen=True, slots=True)
class Line:
    """An example together with the line that it stands in."""

    where: str
    """FILE:LINE, as errors name it."""
    written: bytes
    """As it stands in the file, without its line feed."""
    record: dict[str, Any]
    """All of its keys."""
    example: OfLine


def read_examples(files: Files) -> list[Example]:
    """The examples of one or several files, in their order.

    Of a `.jsonl` file (or `.json`, of the same form) each line is an object with either `text`, or
    `prompt` and `completion`, or `messages` (a list of objects with `role` and `content`); its other
    keys are not read, and blank lines are passed over. A `.txt` file is one `Document`. All are UTF-8.

    Raises:
        DataError: a file cannot be read or has no example, or a line is none. The message begins
            with `FILE:LINE:` and never quotes the text.
    """
    paths = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
    if not paths:
        raise DataError("there is no file to learn from: name at least one .jsonl or .txt file")
    return [example for path in paths for example in _examples(path)]


def read_lines(file: str | Path) -> list[Line]:
    """The same of one `.jsonl` file, each example with its line as it stands.

    Raises:
        DataError: as `read_examples`, or the file is a `.txt`, which has no lines to tell apart.
    """
    path = Path(file)
    if path.suffix.lower() == ".txt":
        raise DataError(f"{path}: a .txt is one document, not examples: write an example a line, as .jsonl")
    return list(_lines(path))


def _examples(path: Path) -> list[Example]:
    if path.suffix.lower() == ".txt":
        return [_document(path, _content(path))]
    return [line.example for line in _lines(path)]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): name a file that is there") from None


def _document(path: Path, content: bytes) -> Document:
    try:
        return Document(str(path), content.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: this is not UTF-8: save the file as UTF-8") from None


def _lines(path: Path) -> Iterator[Line]:
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise DataError(f"{path}: a file of this kind is not read: give .jsonl (an example a line) or .txt")
    is_empty = True
    for number, written in enumerate(_content(path).split(b"\n"), start=1):
        if written.strip():
            is_empty = False
            where = f"{path}:{number}"
            record = _record(where, written)
            yield Line(where, written, record, _example(where, record))
    if is_empty:
        raise DataError(f"{path}: the file is empty: write an example a line")


def _record(where: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise DataError(f"{where}: this is not UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: this is not JSON ({error.msg}, column {error.colno}): write one whole object a line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: this JSON cannot be read ({error}): make it simpler") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: this is {kind_of(record)}, not an object: write {{...}}, and {TELL_ONE}")
    return record


def _example(where: str, record: dict[str, Any]) -> OfLine:
    named = tuple(key for key in KEYS if key in record)
    kind = KINDS.get(named)
    if kind is not None:
        return kind(where, *(record[key] for key in named))
    if not named:
        raise DataError(f"{where}: the object has no example in it: {TELL_ONE}")
    raise DataError(f"{where}: {' and '.join(named)} alone is no example of one kind: {TELL_ONE}")


def _require_message(where: str, name: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise DataError(f"{where}: {name} is {kind_of(message)}: make it an object with role and content")
    for key in ("role", "content"):
        if key not in message:
            raise DataError(f"{where}: {name} has no {key}: give every message a role and a content")
        require_text(where, f"{name}.{key}", message[key])


def require_text(where: str, name: str, value: Any) -> None:
    """Raises DataError for what is no text, is empty, or cannot be written."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {kind_of(value)}: make it a text in quotes")
    if not value.strip():
        raise DataError(f"{where}: {name} is empty: fill it in, or leave it out of the data")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: {name} has half a character in it (a lone surrogate): write the whole character"
        ) from None


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number")
