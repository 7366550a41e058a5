"""What the benchmarks of a GPU share: a model of random weights, figures told at once, deadlines."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "src"
sys.path.insert(0, str(SOURCES))
# For processes of the benchmarks, too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(SOURCES), str(HERE), os.environ.get("PYTHONPATH", "")])

SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
}
TINY = SHAPE | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "num_hidden_layers": 6}
MODES = ("off", "default", "max")


class Bench:
    """Shape and device, and what was found."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.is_tiny = given.cpu
        self.device = "cpu" if given.cpu else "cuda"
        self.shape = TINY if given.cpu else SHAPE
        self.dtype = torch.float32 if given.cpu else torch.bfloat16
        self.prompt, self.new = (8, 4) if given.cpu else (128, 100)
        self.found: list[dict[str, Any]] = []
        self._model, self._output = given.model, given.output
        name = "cpu" if given.cpu else torch.cuda.get_device_name()
        self.note("machine", device=name, torch=torch.__version__)

    def note(self, name: str, **figures: Any) -> None:
        """Printed and written now: a benchmark that is cut off has told what it had."""
        self.found.append({"what": name} | figures)
        print(json.dumps({"what": name} | figures), flush=True)
        if self._output:
            self._output.write_text(json.dumps(self.found, indent=2))

    def note_failure(self, section: str, error: Exception) -> None:
        self.note(f"{section} failed", error=repr(error)[:500])

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def model(self) -> Iterator[str]:
        """The folder of the model, made where it is not there; kept only if it was named."""
        shared = Path("/dev/shm")
        with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as made:
            folder = str(self._model or made)
            if not Path(folder, "config.json").is_file():
                started = time.monotonic()
                self._save_model(folder)
                self.note("model saved", seconds=time.monotonic() - started)
            yield folder

    def _save_model(self, folder: str) -> None:
        torch.set_default_dtype(self.dtype)
        with torch.device(self.device):
            model = LlamaForCausalLM(LlamaConfig(**self.shape))
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder)
        del model
        self.free()

    def table(self) -> None:
        print("\n| what | figures |\n| --- | --- |")
        for row in self.found:
            rest = ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
                if key != "what"
            )
            print(f"| {row['what']} | {rest} |")


def arguments(about: str, sections: Sequence[str], modes: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="try the script with tiny shapes")
    parser.add_argument("--only", nargs="+", default=list(sections), choices=sections)
    parser.add_argument("--modes", nargs="+", default=list(modes), help="of the server: off, default, max")
    parser.add_argument("--model", type=Path, help="the model's folder, kept; made where it is not there")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    return parser


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread, whatever that waits for."""

    def late(signum: int, frame: Any) -> None:
        raise TimeoutError(f"not done within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
