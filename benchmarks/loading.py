"""What does a client hold in memory to load bottom and top of a 1B-shaped model, at its peak?

Makes a random checkpoint (2.5 GB, bfloat16, two shards) in a temporary folder. Two clients load it and
run 64 tokens through bottom and top, each in a process of its own: from the whole folder, and from a
slice of it. They connect to no server.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import ONE_THREAD, markdown, peak_memory_mb, write

ALLOWED_MB = 600
SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


def make_checkpoint(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.save_pretrained(folder, max_shard_size="1500MB")


def slice_checkpoint(folder: Path, output: Path) -> None:
    from splitlearn.model.checkpoint import Checkpoint
    from splitlearn.model.plan import SplitPlan
    from splitlearn.model.slices import write_slice

    checkpoint = Checkpoint.open(str(folder))
    write_slice(checkpoint, SplitPlan.for_config(checkpoint.config, 2, 2), "client", output)


def no_trunk() -> Any:
    """Stands where the trunk would: gives back what it is given."""
    import torch

    class NoTrunk(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **asked: Any) -> torch.Tensor:
            return hidden_states

    return NoTrunk()


def load(folder: Path) -> None:
    """In a process of its own: prints what was held before, what is kept, and what was held at the peak."""
    import torch
    import transformers  # noqa: F401

    from splitlearn.model.checkpoint import Checkpoint
    from splitlearn.model.plan import SplitPlan
    from splitlearn.model.weights import load_client

    before = peak_memory_mb()
    checkpoint = Checkpoint.open(str(folder))
    plan = SplitPlan.for_config(checkpoint.config, 2, 2)
    model = load_client(checkpoint, plan, no_trunk)
    # The tensors are mapped from the file: only a forward brings all of them into memory.
    with torch.no_grad():
        model(torch.arange(64)[None], use_cache=False)
    weights = sum(tensor.nbytes for tensor in {id(p): p for p in model.parameters()}.values())
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(
        json.dumps(
            {
                "libraries_mb": round(before),
                "weights_mb": round(weights / 2**20),
                "files_mb": round(total / 2**20),
                "peak_mb": round(peak_memory_mb()),
            }
        )
    )


def measured(folder: Path) -> dict[str, int]:
    command = [sys.executable, __file__, "--load", str(folder)]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(part: str, *arguments: Path) -> None:
    subprocess.run(
        [sys.executable, __file__, part, *map(str, arguments)], env=os.environ | ONE_THREAD, check=True
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        whole, sliced = Path(temporary) / "whole", Path(temporary) / "slice"
        run("--make", whole)
        run("--slice", whole, sliced)
        figures = {"whole folder": measured(whole), "client's slice": measured(sliced)}
    rows = [
        (
            name,
            f["files_mb"],
            f["weights_mb"],
            f["libraries_mb"],
            f["peak_mb"],
            f["peak_mb"] - f["weights_mb"],
        )
        for name, f in figures.items()
    ]
    header = (
        "loaded from", "files, MB", "bottom + top, MB", "libraries alone, MB", "peak, MB",
        f"peak over weights, MB (allowed {ALLOWED_MB})",
    )  # fmt: skip
    write("loading", figures, markdown(header, rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make", type=Path)
    parser.add_argument("--slice", type=Path, nargs=2)
    parser.add_argument("--load", type=Path)
    given = parser.parse_args()
    if given.make:
        make_checkpoint(given.make)
    elif given.slice:
        slice_checkpoint(*given.slice)
    elif given.load:
        load(given.load)
    else:
        main()
