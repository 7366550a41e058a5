"""Does a split model give what the whole model gives, for every family, alone and in a batch?

Random models of six layers, cut 2/2/2, over a real gRPC server in this process, in float32: the checks are
those of tests/parity. Logits are compared bit for bit where a session runs alone; where sessions of different
length share a batch, by the largest difference over the largest logit.

    python benchmarks/parity.py [FAMILY ...]
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from typing import Any

import torch
from _common import markdown, write
from transformers.utils import logging

from splitlearn.testing.pair import lively_model, served_pair
from splitlearn.testing.parity import ALONE, BATCHED, Distance
from splitlearn.testing.tiny import PROVEN, UNLISTED, VARIANTS

TEXTS = ("greedy", "beams", "sampling", "prompt_lookup", "greedy_without_cache")


def measure(family: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, served_pair(lively_model(family, folder)) as pair:
        trunk = pair.engine.trunk
        alone = {name: check(pair) for name, check in ALONE.items()}
        batched = {name: check(pair) for name, check in BATCHED.items()} if trunk.batched else {}
        return {
            "alone": {name: figures(found) for name, found in alone.items()},
            "batched": {
                name: figures(found) | {"ragged_batches": found.ragged} for name, found in batched.items()
            },
            "one_by_one_because": trunk.batched_reason,
        }


def figures(found: Distance) -> dict[str, Any]:
    return {"bitwise": found.bitwise, "relative": found.relative, "texts_equal": found.texts_equal}


def row(family: str, found: dict[str, Any]) -> list[str]:
    alone, batched = found["alone"], found["batched"]
    texts = [("equal" if alone[name]["texts_equal"] else "DIFFERENT") for name in TEXTS]
    in_batch = f"one by one: {found['one_by_one_because']}"
    if batched:
        equal = "equal" if all(each["texts_equal"] for each in batched.values()) else "DIFFERENT"
        count = sum(each["ragged_batches"] for each in batched.values())
        in_batch = f"{worst(batched)}, texts {equal} ({count} batches)"
    bitwise = "yes" if all(each["bitwise"] for each in alone.values()) else "NO"
    return [family, bitwise, worst(alone), in_batch, *texts]


def worst(checks: dict[str, dict[str, Any]]) -> str:
    return f"{max(each['relative'] for each in checks.values()):.1e}"


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = {}
    for family in sys.argv[1:] or [*PROVEN, *VARIANTS, *UNLISTED]:
        found[family] = measure(family)
        print(*row(family, found[family]), sep="  ", flush=True)
    header = [
        "family",
        "alone: bitwise",
        "alone: worst",
        "in a batch: worst",
        *(name.replace("_", " ") for name in TEXTS),
    ]
    name = f"parity-torch{version('torch').split('+')[0]}-transformers{version('transformers')}"
    write(name, found, markdown(header, [row(family, each) for family, each in found.items()]))


if __name__ == "__main__":
    main()
