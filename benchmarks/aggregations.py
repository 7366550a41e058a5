"""What does each aggregation of a cohort's round cost, beside the optimizer step that follows it?

Gradients of a LoRA adapter of rank 16 on all linear layers of SmolLM2-135M's trunk (26 layers), drawn,
float32, on one thread: its processor time, so that others' work counts for little. Medians of five.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from _common import markdown, write
from torch import Tensor

from splitlearn.bench.machine import circumstances
from splitlearn.engine import optimizer
from splitlearn.engine.aggregations import AGGREGATIONS, aggregation_of
from splitlearn.vocabulary import CohortSettings, OptimizerSettings

RANK, LAYERS, TIMES = 16, 26, 5
HIDDEN, KEYS, INNER = 576, 192, 1536
INTO_AND_OUT_OF = [
    (HIDDEN, HIDDEN),
    (HIDDEN, KEYS),
    (HIDDEN, KEYS),
    (HIDDEN, HIDDEN),
    (HIDDEN, INNER),
    (HIDDEN, INNER),
    (INNER, HIDDEN),
]
MEMBERS = (5, 10, 20)
OPTIMIZERS = ("adamw_torch", "fedadam", "fedyogi")
FIGURES = {"mean": {}, "norm_clip": {"member_norm": 1.0}}


def drawn() -> list[Tensor]:
    shapes = [shape for into, out in INTO_AND_OUT_OF for shape in ((RANK, into), (out, RANK))]
    return [torch.randn(shape) for shape in shapes * LAYERS]


def timed_ms(work: Callable[[], object]) -> float:
    def once() -> float:
        started = time.process_time()
        work()
        return 1e3 * (time.process_time() - started)

    once()
    return median(once() for _ in range(TIMES))


def aggregation_ms(name: str, members: int) -> float:
    settings = CohortSettings(
        "sync", members=members, aggregation=name, **FIGURES.get(name, {"byzantine": 1})
    )
    each, shares = [drawn() for _ in range(members)], [1 / members] * members
    return timed_ms(lambda: aggregation_of(settings).merge(each, shares))


def optimizer_ms(name: str) -> float:
    weights = [weight.requires_grad_() for weight in drawn()]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return timed_ms(optimizer.build(OptimizerSettings(name), weights).step)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = {name: [aggregation_ms(name, members) for members in MEMBERS] for name in AGGREGATIONS}
    steps = {name: optimizer_ms(name) for name in OPTIMIZERS}
    header = ("aggregation, processor ms a round", *(f"{members} members" for members in MEMBERS))
    table = markdown(header, [(name, *(f"{each:.0f}" for each in ms)) for name, ms in rows.items()])
    table += "\n\n" + markdown(
        ("optimizer", "processor ms a step"), [(name, f"{ms:.0f}") for name, ms in steps.items()]
    )
    busy = circumstances()["busy"]
    weights = sum(weight.numel() for weight in drawn())
    table += f"\n\n{weights:,} weights. Processes that wanted a processor in the last minute: {busy}."
    write("aggregations", {"ms": rows, "optimizer_ms": steps, "weights": weights, "busy": busy}, table)


if __name__ == "__main__":
    main()
