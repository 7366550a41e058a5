"""The whole model's greedy text, made in a process of its own, so that its memory is not the client's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from splitlearn.errors import CheckpointError

RUN_S = 900


@dataclass(frozen=True, slots=True)
class WholeRun:
    """What the whole model made of the same tokens, on one thread."""

    token_ids: list[int]
    time_to_first_token_s: float
    tokens_per_s: float
    peak_memory_bytes: int | None


def run_whole(model: Path, prompt_ids: list[int], max_new_tokens: int) -> WholeRun:
    """Raises CheckpointError with the process's last line where it failed."""
    task = json.dumps({"model": str(model), "prompt_ids": prompt_ids, "max_new_tokens": max_new_tokens})
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=task,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CheckpointError(f"the whole model could not be run from {model}: {reason}")
    return WholeRun(**json.loads(done.stdout))


def _run(model: str, prompt_ids: list[int], max_new_tokens: int) -> WholeRun:
    import torch

    from splitlearn.cli.generation import generate_text
    from splitlearn.cli.memory import peak_memory_bytes
    from splitlearn.cli.text import load_tokenizer
    from splitlearn.cli.whole_model import load_whole

    ids_1T = torch.tensor([prompt_ids])
    inputs = {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}
    made = generate_text(
        load_whole(model), load_tokenizer(model), inputs, max_new_tokens=max_new_tokens, do_sample=False
    )
    return WholeRun(
        made.token_ids, made.pace.time_to_first_token_s, made.pace.tokens_per_s, peak_memory_bytes()
    )


if __name__ == "__main__":
    print(json.dumps(asdict(_run(**json.load(sys.stdin)))))
