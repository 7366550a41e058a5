"""Does a run that was killed and resumed end with the adapter of the run that nobody disturbed?

A tiny model, LoRA on all linear layers with dropout, 30 steps of two microbatches, a checkpoint every five;
server and client as two processes. kill -9 of the client, the server or both at a random moment, for every
third seed one within a save. What was killed is started again, and the client resumes; where it has no
checkpoint yet, it trains from the start, under the run's name or, if that is refused, under another. Wanted:
equal bit for bit. The control is another seed's adapter: it must differ.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from _common import markdown, write
from _kill import (
    KILLED,
    SAVE_STEPS,
    STEPS,
    Done,
    Failed,
    Saved,
    Sides,
    Stepped,
    Training,
    Weights,
    sides,
    zygote,
)

from splitlearn.testing import lively_model

SEEDS = 10


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """What a run comes to, and when each step ended and each save was over, from its first step on."""

    adapter: Weights
    stepped: dict[int, float]
    saved: dict[int, float]


@dataclass(frozen=True, slots=True)
class Moment:
    """So many seconds after the client told of a step."""

    step: int
    later_s: float
    in_save: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    kind: str
    seed: int
    moment: Moment
    steps_done: int
    """When it was killed."""
    resumed_from: int
    """0: from the start."""
    refused: str
    """What a start from the beginning was told under the run's name, where that was refused."""
    error: str
    """How the client ended that was trained first, and how long after the kill."""
    error_s: float
    equal: bool
    apart: float
    """The largest difference of a weight."""


def undisturbed(context: Any, training: Training, folder: Path) -> Undisturbed:
    with sides(context, training, folder) as both:
        client = both.start_client(resume=False)
        require_done(client.end(), both)
        stepped = {each.step: each.at for each in client.told if isinstance(each, Stepped)}
        saved = {each.step: each.at for each in client.told if isinstance(each, Saved)}
        start = stepped[1]
        return Undisturbed(
            both.adapter(),
            {step: at - start for step, at in stepped.items()},
            {step: at - start for step, at in saved.items()},
        )


def draw(run: Undisturbed, kind: str, seed: int) -> Moment:
    """Uniform over the undisturbed run; within one of its saves for every third seed."""
    chance = random.Random(f"{kind} {seed}")
    if seed % 3 == 0:
        step = chance.choice(list(run.saved))
        return Moment(step, chance.uniform(0, run.saved[step] - run.stepped[step]), in_save=True)
    at = chance.uniform(0, run.saved[STEPS])
    step = max(step for step, ended in run.stepped.items() if ended <= at)
    return Moment(step, at - run.stepped[step], in_save=at < run.saved.get(step, 0))


def disturbed(
    context: Any, training: Training, folder: Path, kind: str, moment: Moment, wanted: Weights
) -> Outcome:
    with sides(context, training, folder) as both:
        first = both.start_client(resume=False)
        first.until(lambda message: isinstance(message, Stepped) and message.step == moment.step)
        time.sleep(moment.later_s)
        killed_at = time.monotonic()
        both.kill(*KILLED[kind])
        ended = first.end()
        if "server" in KILLED[kind]:
            both.start_server()
        resume = both.has_checkpoint
        second, refused = both.start_client(resume=resume), ""
        if isinstance(failed := second.end(), Failed) and not resume:
            refused = f"{failed.kind}: {failed.message}"
            second = both.start_client(resume=False, run="another")
        require_done(second.end(), both)
        found = both.adapter()
    return Outcome(
        kind=kind,
        seed=training.seed,
        moment=moment,
        steps_done=first.step,
        resumed_from=second.first_step - 1,
        refused=refused,
        error=ended.kind if isinstance(ended, Failed) else how_without_word(kind, ended),
        error_s=ended.at - killed_at if isinstance(ended, Failed) else 0.0,
        equal=same(found, wanted),
        apart=max(float((found[name] - weight).abs().max()) for name, weight in wanted.items()),
    )


def how_without_word(kind: str, ended: Any) -> str:
    if ended is None:
        return "untyped error" if kind == "server" else "killed"
    return "had ended before"


def require_done(ended: Any, both: Sides) -> None:
    if not isinstance(ended, Done):
        kept = Path(tempfile.mkdtemp(prefix="kill_resume-"))
        for log in both.logs.glob("*.log"):
            shutil.copy(log, kept)
        raise SystemExit(f"a client that nobody killed ended with {ended}: see {kept}")


def same(found: Weights, wanted: Weights) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def measure(kinds: Sequence[str], seeds: int, evaluates: bool) -> Iterator[tuple[Undisturbed, list[Outcome]]]:
    """For each seed, the undisturbed run and what became of it under each kind of kill."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, context = Path(temporary), zygote()
        model = lively_model("llama", folder / "model")
        for seed in range(seeds):
            training = Training(model, seed, evaluates)
            run = undisturbed(context, training, folder / f"{seed}")
            outcomes = [
                disturbed(
                    context, training, folder / f"{seed}-{kind}", kind, draw(run, kind, seed), run.adapter
                )
                for kind in kinds
            ]
            yield run, outcomes


def row(kind: str, outcomes: Sequence[Outcome]) -> tuple[object, ...]:
    lost = [each.steps_done - each.resumed_from for each in outcomes]
    ends = Counter(each.error for each in outcomes)
    return (
        kind,
        len(outcomes),
        sum(each.moment.in_save for each in outcomes),
        sum(each.equal for each in outcomes),
        f"{statistics.mean(lost):.1f} (at most {max(lost)})",
        sum(each.resumed_from == 0 for each in outcomes),
        sum(bool(each.refused) for each in outcomes),
        ", ".join(f"{end} {count}" for end, count in ends.items()) if kind == "server" else "",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--kinds", nargs="+", choices=KILLED, default=list(KILLED))
    parser.add_argument("--evaluate", action="store_true", help="before each save")
    asked = parser.parse_args()
    outcomes: list[Outcome] = []
    adapters: list[Weights] = []
    for run, found in measure(asked.kinds, asked.seeds, asked.evaluate):
        adapters.append(run.adapter)
        outcomes += found
        for each in found:
            print(each, flush=True)
    others_differ = not any(same(a, b) for a, b in combinations(adapters, 2))
    header = (
        f"killed (of {STEPS} steps, a save every {SAVE_STEPS})", "seeds", "of those within a save",
        "equal bit for bit (wanted: all)", "steps lost, mean", "from the start", "of those refused by name",
        "how the client ended",
    )  # fmt: skip
    rows = [row(kind, [each for each in outcomes if each.kind == kind]) for kind in asked.kinds]
    control = f"control: the adapters of {len(adapters)} seeds differ"
    rows.append((control, len(adapters), "", others_differ, "", "", "", ""))
    figures = {"others_differ": others_differ, "outcomes": [asdict(each) for each in outcomes]}
    write("kill_resume_evaluating" if asked.evaluate else "kill_resume", figures, markdown(header, rows))
    if not (others_differ and all(each.equal and each.error != "untyped error" for each in outcomes)):
        sys.exit("a resumed run ended with another adapter, or a client without a typed error")


if __name__ == "__main__":
    main()
