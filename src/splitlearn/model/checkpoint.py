"""A model on disk or on the hub: which tensors it has, for which part, and reading only those."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from splitlearn.errors import CheckpointError, UnsupportedModel
from splitlearn.model.families import Family, family_of
from splitlearn.model.plan import SplitPlan
from splitlearn.model.safetensors_file import TensorEntry, read_header
from splitlearn.model.slice_note import NOTE_FILE, SliceNote

Part = Literal["bottom", "trunk", "top", "unused"]
Side = Literal["client", "trunk"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_BEFORE_THE_LAYERS = re.compile(r"emb|wte|wpe|project_in")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's configuration and the names of its tensors; a tensor is opened when it is read."""

    source: str
    config: PreTrainedConfig
    family: Family
    files: Mapping[str, str]
    """For each tensor's name, the file that holds it."""
    note: SliceNote | None
    """What `splitlearn slice` wrote down, if this folder is one of its slices."""
    find: Callable[[str], Path | None] = field(repr=False)
    """The local path of one of the model's files; from the hub it is fetched first."""

    @classmethod
    def open(cls, source: str | Path, *, token: str | None = None, revision: str | None = None) -> Checkpoint:
        """Read what a folder or hub id holds; what cannot be cut is refused before its weights."""
        source = str(source)
        _check_folder(source)
        config = _read_config(source, token, revision)
        family = family_of(config)
        # The commit that the configuration came from, so that all files are of one version.
        revision = getattr(config, "_commit_hash", None) or revision

        def find(name: str) -> Path | None:
            return _find(source, name, token, revision)

        note_path = find(NOTE_FILE)
        note = SliceNote.read(note_path) if note_path else None
        return cls(source, config, family, _read_index(source, find), note, find)

    @property
    def keys(self) -> list[str]:
        return sorted(self.files)

    def part_of(self, key: str, plan: SplitPlan) -> Part:
        """Which part a tensor belongs to; what is in no layer stays with the client."""
        return part_of(key, plan)

    def keys_of(self, side: Side, plan: SplitPlan) -> list[str]:
        """The tensors that the client (bottom and top) or the trunk needs."""
        wanted = ("trunk",) if side == "trunk" else ("bottom", "top")
        return [key for key in self.keys if part_of(key, plan) in wanted]

    def check_serves(self, side: Side, plan: SplitPlan) -> None:
        """A slice holds one side of one split; a whole model serves any."""
        if self.note is not None:
            self.note.check(self.source, side, plan)

    def file(self, name: str) -> Path:
        """One of the model's files, which must be there."""
        path = self.find(name)
        if path is None:
            raise CheckpointError(f"{self.source} lacks {name}; download or save the model again")
        return path

    def entries(self, keys: Iterable[str]) -> dict[str, tuple[Path, TensorEntry]]:
        """Where each tensor's bytes lie."""
        entries: dict[str, tuple[Path, TensorEntry]] = {}
        for path, names in self._by_file(keys).items():
            header = read_header(path)
            for name in names:
                if name not in header:
                    raise CheckpointError(f"{path} lacks {name}, which the model's index names")
                entries[name] = (path, header[name])
        return entries

    @contextmanager
    def slices(self, keys: Iterable[str], *, mapped: bool = True) -> Iterator[dict[str, Any]]:
        """Each tensor as a handle, read when it is indexed; the files stay open meanwhile.

        A mapped tensor lies in the file until it is changed. One that is converted anyway is better
        read: else file and result are in memory together.
        """
        backend = "mmap" if mapped else "pread"
        handles: dict[str, Any] = {}
        with ExitStack() as open_files:
            for path, names in self._by_file(keys).items():
                read_header(path)
                file = open_files.enter_context(safe_open(str(path), framework="pt", backend=backend))
                handles |= {name: file.get_slice(name) for name in names}
            yield handles

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """These tensors and no others; they lie in the mapped file until they are changed."""
        tensors: dict[str, Tensor] = {}
        for path, names in self._by_file(keys).items():
            read_header(path)
            with safe_open(str(path), framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in names}
        return tensors

    def _by_file(self, keys: Iterable[str]) -> dict[Path, list[str]]:
        names: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            names[self.files[key]].append(key)
        return {self.file(name): wanted for name, wanted in names.items()}


def part_of(key: str, plan: SplitPlan) -> Part:
    """A layer's index stands in its tensors' names, with or without the base model's prefix."""
    found = _LAYER.search(key)
    if found is None:
        return "bottom" if _BEFORE_THE_LAYERS.search(key) else "top"
    index = int(found[1])
    if index in plan.trunk:
        return "trunk"
    if index >= plan.num_layers:
        return "unused"  # layers for predicting several tokens, which the library does not run
    return "bottom" if index in plan.bottom else "top"


def _check_folder(source: str) -> None:
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not Path(source).is_dir():
        raise CheckpointError(f"there is no folder {source}; give a model's folder or its hub id")


def _read_config(source: str, token: str | None, revision: str | None) -> PreTrainedConfig:
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise CheckpointError(f"{source} lacks config.json: it is not a model's folder")
    try:
        return AutoConfig.from_pretrained(source, token=token, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise CheckpointError(_unreadable(source, error)) from None
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"{source} is not supported: transformers has no class for its configuration, "
            f"or it wants code of its own ({_first_line(error)})"
        ) from None


def _find(source: str, name: str, token: str | None, revision: str | None) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        found = cached_file(
            source,
            name,
            token=token,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(_unreadable(source, error)) from None
    return Path(found) if found else None


def _read_index(source: str, find: Callable[[str], Path | None]) -> dict[str, str]:
    index = find(INDEX_FILE)
    if index is not None:
        try:
            return dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} cannot be read ({error}); download it again") from None
    weights = find(WEIGHTS_FILE)
    if weights is None:
        raise CheckpointError(_no_safetensors(source))
    return dict.fromkeys(read_header(weights), WEIGHTS_FILE)


def _no_safetensors(source: str) -> str:
    folder = Path(source)
    if folder.is_dir() and any(folder.glob("*.gguf")):
        what = "holds GGUF files, which are not cut"
    elif folder.is_dir() and any(folder.glob("*.bin")):
        what = "holds pickled weights, and nothing pickled is opened"
    else:
        what = f"has no {WEIGHTS_FILE}"
    return f"{source} {what}; load it with transformers and save_pretrained it as safetensors"


def _unreadable(source: str, error: Exception) -> str:
    what = "cannot be read" if Path(source).is_dir() else "is no folder here, and as a hub id cannot be read"
    return f"{source} {what}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
