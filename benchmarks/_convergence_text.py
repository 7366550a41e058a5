"""Public text of several sources in rows of one length: the docstrings of installed packages."""

from __future__ import annotations

import ast
import importlib.util
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

SOURCES = ("numpy", "torch", "sympy", "matplotlib", "networkx", "transformers")
"""A class each: the texts of its docstrings."""
FEWEST_CHARACTERS = 400
HELD_OUT_FILES = 5
"""Every so manieth file of a package is held out, whole."""
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Texts:
    """Rows (rows, tokens) to learn and to measure on, and the source of each by its number."""

    train: torch.Tensor
    classes: tuple[int, ...]
    held_out: torch.Tensor


def texts_of(encode: Encode, tokens: int, train_rows: int, held_out_rows: int, seed: int) -> Texts:
    """As many rows of each source, in an order drawn with the seed; a document's end is cut off."""
    each, kept_back = train_rows // len(SOURCES) + 1, held_out_rows // len(SOURCES)
    rows: list[tuple[int, list[int]]] = []
    held_out: list[list[int]] = []
    for number, source in enumerate(SOURCES):
        learned, measured = _files(source, seed)
        rows += [(number, row) for row in _rows(learned, encode, tokens, each)]
        held_out += _rows(measured, encode, tokens, kept_back)
    random.Random(seed).shuffle(rows)
    del rows[train_rows:]
    return Texts(
        torch.tensor([row for _, row in rows]),
        tuple(number for number, _ in rows),
        torch.tensor(held_out),
    )


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in SOURCES)


def _files(package: str, seed: int) -> tuple[list[Path], list[Path]]:
    """To learn from, and held out."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed, whose docstrings are learned: pip install {package}")
    files = [path for path in sorted(Path(spec.origin).parent.rglob("*.py")) if "tests" not in path.parts]
    random.Random(seed).shuffle(files)
    held_out = files[::HELD_OUT_FILES]
    return [path for path in files if path not in set(held_out)], held_out


def _rows(files: list[Path], encode: Encode, tokens: int, count: int) -> list[list[int]]:
    found: list[list[int]] = []
    for text in _docstrings(files):
        ids = encode(text)
        # The first row of a text: so no source gives many rows of one long table.
        if len(ids) >= tokens:
            found.append(ids[:tokens])
        if len(found) == count:
            return found
    raise SystemExit(f"only {len(found)} of {count} texts of {tokens} tokens: name fewer steps")


def _docstrings(files: list[Path]) -> Iterator[str]:
    told: set[str] = set()
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= FEWEST_CHARACTERS and text not in told:
                    told.add(text)
                    yield text
