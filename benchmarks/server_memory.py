"""Does a server's memory stay flat while runs, evaluations, checkpoints and sessions come and go?

A tiny model, 2,000 steps of a hand-written loop over gRPC with rows of many lengths; now and then an
evaluation, a checkpoint, a generation session with the run's adapter, and a second run that is trained, saved
and deleted. The resident memory of the server's process is sampled every ten steps. Wanted: the mean of the
last quarter within 2 % of the second's. A tiny model's server is mostly libraries, so beside it stands how
far apart the two were if one version of the adapter were kept at each step.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import markdown, serving, write
from _training import Trained, batch, lora

from splitlearn.client.calls import delete_run
from splitlearn.testing import tiny_model

STEPS, SAMPLE_EVERY, GENERATE_EVERY, EVALUATE_EVERY, SAVE_EVERY, SECOND_RUN_EVERY = (
    2000,
    10,
    30,
    100,
    200,
    150,
)
ROWS, LENGTHS, VOCABULARY = 4, (8, 64), 128
NEW_TOKENS, SECOND_STEPS, CALL_S = 8, 3, 60
WANTED = 0.02
SERVER_FLAGS = ("--session-tokens", "128", "--kv-budget", "32MiB")
MB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """Of the server's process."""

    step: int
    rss_bytes: int
    open_files: int
    threads: int

    @classmethod
    def take(cls, pid: int, step: int) -> Sample:
        process = Path(f"/proc/{pid}")
        resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(
            step, resident, len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))
        )


def train(folder: Path, address: str, pid: int) -> tuple[list[Sample], int]:
    """The samples, and the bytes of one version of the trunk's adapter."""
    lengths = random.Random(0)
    samples = [Sample.take(pid, 0)]
    trained = Trained.split(folder, address, lora(r=4), dtype=torch.float32)
    for step in range(1, STEPS + 1):
        ids = batch(ROWS, lengths.randint(*LENGTHS), VOCABULARY, seed=step)
        trained.step(ids)
        if step % GENERATE_EVERY == 0:
            generate(trained, ids[:1, : LENGTHS[0]])
        if step % EVALUATE_EVERY == 0:
            evaluate(trained, ids)
        if step % SAVE_EVERY == 0:
            trained.model.trunk.save()
            trained.model.trunk.acknowledge(step)
        if step % SECOND_RUN_EVERY == 0:
            come_and_go(folder, address, ids)
        if step % SAMPLE_EVERY == 0:
            samples.append(Sample.take(pid, step))
        if step % (STEPS // 20) == 0:
            print(samples[-1], flush=True)
    adapter = trained.model.trunk.transport.download_adapter(trained.model.trunk.run.name)
    trained.model.close()
    return samples, sum(weight.nbytes for weight in adapter.weights.values())


@torch.no_grad()
def evaluate(trained: Trained, ids: torch.Tensor) -> None:
    trained.model.eval()
    trained.model(ids, labels=ids, use_cache=False)
    trained.model.train()


def generate(trained: Trained, ids: torch.Tensor) -> None:
    trained.model.eval()
    trained.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    trained.model.train()


def come_and_go(folder: Path, address: str, ids: torch.Tensor) -> None:
    """A second client with a run of its own, which it saves and deletes."""
    second = Trained.split(folder, address, lora(r=4), dtype=torch.float32)
    for _ in range(SECOND_STEPS):
        second.step(ids)
    second.model.trunk.save()
    second.model.close()
    delete_run(address, second.model.trunk.run.name, CALL_S)


def quarter(samples: Sequence[Sample], number: int) -> list[Sample]:
    """The first is number 1."""
    return [each for each in samples if (number - 1) * STEPS / 4 < each.step <= number * STEPS / 4]


def mean_rss(samples: Sequence[Sample]) -> float:
    return statistics.mean(each.rss_bytes for each in samples)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = tiny_model("llama", Path(temporary) / "model")
        with serving(folder, *SERVER_FLAGS, "--state-dir", temporary) as server:
            started = time.perf_counter()
            samples, version_bytes = train(folder, server.address, server.pid)
            seconds = time.perf_counter() - started
    second, last = (mean_rss(quarter(samples, number)) for number in (2, 4))
    growth, if_kept = last / second - 1, version_bytes * STEPS / 2 / second
    second_half = quarter(samples, 3) + quarter(samples, 4)
    slope = statistics.linear_regression(
        [each.step for each in second_half], [each.rss_bytes for each in second_half]
    ).slope
    first, end = samples[1], samples[-1]
    rows = [
        ("RSS before the first step, MB", f"{samples[0].rss_bytes / MB:.1f}"),
        *(
            (f"RSS, mean of quarter {number}, MB", f"{mean_rss(quarter(samples, number)) / MB:.2f}")
            for number in (1, 2, 3, 4)
        ),
        (f"last quarter over the second (wanted within {WANTED:.0%})", f"{growth:+.2%}"),
        ("the same, were one version of the adapter kept at each step", f"{if_kept:+.2%}"),
        ("flat", "yes" if abs(growth) <= WANTED else "NO"),
        ("growth over the second half, bytes a step", f"{slope:+.0f}"),
        (f"open files at step {first.step} / at the end", f"{first.open_files} / {end.open_files}"),
        (f"threads at step {first.step} / at the end", f"{first.threads} / {end.threads}"),
    ]
    figures = {
        "growth": growth,
        "if_a_version_were_kept": if_kept,
        "slope_bytes_a_step": slope,
        "seconds": seconds,
        "rss_bytes": [each.rss_bytes for each in samples],
    }
    write("server_memory", figures, markdown((f"tiny model, {STEPS:,} steps", "figure"), rows))
    if abs(growth) > WANTED:
        sys.exit("the server's memory is not flat")


if __name__ == "__main__":
    main()
