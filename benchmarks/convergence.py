"""Do five clients with a fifth of the data each learn what one client with all of it learns, by each rule?

SmolLM2-135M in float32, LoRA r=8 on the trunk, bottom and top frozen; server and clients are processes of
their own with one thread each. The texts are docstrings of installed packages, a class each, dealt out alike
(iid) or by a Dirichlet draw for each class. Each rule sees the same number of tokens as the one client; the
loss is measured with each run's adapter on the whole model, on files of the packages that nobody learns from.

The second question: one of the five takes ten times as long, how many tokens a second does each rule merge,
and what is learned in the same time?
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _common
import torch
from _common import serving
from _convergence import (
    CLIENTS,
    SEED,
    SINGLE,
    SLOWNESS,
    Clients,
    HeldOut,
    Job,
    Point,
    Snapshot,
    Trained,
    tokens_by_version,
)
from _convergence_report import report, shortcomings
from _convergence_text import SOURCES, Encode, Texts, texts_of, versions
from transformers import AutoTokenizer

from splitlearn.cli.demo_model import bundled_model
from splitlearn.testing.pair import lively_model
from splitlearn.training import partition
from splitlearn.vocabulary import CohortSettings

ALPHA = 0.3
RULES = {
    "sync": CohortSettings("sync", members=CLIENTS),
    "quorum": CohortSettings("quorum", members=CLIENTS, quorum=4, timeout_s=1.0, carry_late=True),
    "async": CohortSettings("async", members=CLIENTS),
    "buffered": CohortSettings("buffered", members=CLIENTS, buffer=CLIENTS),
}
PARTITIONS = ("iid", "dirichlet")
PRIVATE = "private"
MARKS = (0.0, 0.33, 0.66, 1.0)
ENDLESS = 100_000


@dataclass(frozen=True, slots=True)
class Setting:
    """Of which model, with how much of everything."""

    model: Path
    encode: Encode
    tokens: int
    steps: int
    held_out_rows: int
    rate: float
    look_s: float
    seconds: float

    @property
    def told(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "clients": CLIENTS,
            "tokens_a_row": self.tokens,
            "steps": self.steps,
            "rows_to_learn": CLIENTS * self.steps,
            "rows_held_out": self.held_out_rows,
            "rate": self.rate,
            "alpha": ALPHA,
            "sources": versions(),
        }


@dataclass(slots=True)
class Bench:
    """What every case needs."""

    setting: Setting
    texts: Texts
    held_out: HeldOut
    before: float
    clients: Clients
    state: Path
    address: str = ""

    @contextmanager
    def served(self, name: str) -> Iterator[None]:
        with serving(self.setting.model, "--state-dir", str(self.state / name)) as server:
            self.address = server.address
            yield

    def job(self, run: str, cohort: CohortSettings, number: int, texts: torch.Tensor, **how: Any) -> Job:
        name = f"m{number}"
        told = {"rows": 1, "steps": self.setting.steps, "rate": self.setting.rate} | how
        key = self.state / "keys" / f"{run}-{name}"
        return Job(self.setting.model, self.address, run, cohort, name, key, texts, **told)

    def parts(self, scheme: str) -> list[torch.Tensor]:
        classes = self.texts.classes
        if scheme == "iid":
            held = partition.iid(len(classes), CLIENTS, SEED)
        else:
            held = partition.dirichlet(classes, CLIENTS, ALPHA, SEED)
        return [self.texts.train[each] for each in held]

    def train(self, jobs: Sequence[Job]) -> Trained:
        return self.clients.train(jobs, self.setting.look_s)

    def points(self, looks: Sequence[Snapshot], tokens_at: Callable[[int], float]) -> list[Point]:
        measured = [(tokens_at(each.version), self.held_out.loss(each.weights)) for each in looks[1:]]
        return [(0.0, self.before), *measured]


# ---------------------------------------------------------------- each rule against one client


def single(bench: Bench, _: str) -> dict[str, Any]:
    """All texts, as many rows a step as the cohort's members have together."""
    job = bench.job(SINGLE, CohortSettings(), 1, bench.texts.train, rows=CLIENTS)
    found = bench.train([job])
    first, a_step = found.snapshots[0].version, CLIENTS * (bench.setting.tokens - 1)

    def tokens_at(version: int) -> float:
        return float((version - first) * a_step)

    return case(found, bench.points(at_marks(found.snapshots, tokens_at), tokens_at))


def private(bench: Bench, scheme: str) -> dict[str, Any]:
    """Each by itself: the mean of what each one's adapter has as its loss."""
    jobs = [
        bench.job(f"{PRIVATE}-{scheme}-{number}", CohortSettings(), number, part)
        for number, part in enumerate(bench.parts(scheme), 1)
    ]
    found = bench.train(jobs)
    losses = [bench.held_out.loss(weights) for weights in found.finals.values()]
    tokens = CLIENTS * bench.setting.steps * (bench.setting.tokens - 1)
    return case(found, [(tokens, sum(losses) / len(losses))]) | {"each": losses}


def together(bench: Bench, rule: str, scheme: str) -> dict[str, Any]:
    run = f"{rule}-{scheme}"
    parts = bench.parts(scheme)
    jobs = [bench.job(run, RULES[rule], number, part) for number, part in enumerate(parts, 1)]
    found = bench.train(jobs)
    tokens_at = counted(bench.state / rule, run)
    points = bench.points(at_marks(found.snapshots, tokens_at), tokens_at)
    return case(found, points) | {"rows_of_each": [len(part) for part in parts]}


def case(found: Trained, points: list[Point]) -> dict[str, Any]:
    return {"loss": points[-1][1], "tokens": points[-1][0], "seconds": found.seconds, "points": points}


def counted(state: Path, run: str) -> Callable[[int], float]:
    """How many tokens are in a version of the adapter; none in those before the first round's."""
    known = tokens_by_version(state, run)
    return lambda version: known.get(version, 0.0)


def at_marks(looks: Sequence[Snapshot], tokens_at: Callable[[int], float]) -> list[Snapshot]:
    """Those that are nearest to a quarter of the way, a half and so on; the last is the last."""
    last = tokens_at(looks[-1].version)
    nearest = [min(looks, key=lambda each: abs(tokens_at(each.version) - mark * last)) for mark in MARKS]
    return sorted({each.version: each for each in [*nearest, looks[-1]]}.values(), key=lambda x: x.version)


# ---------------------------------------------------------------- one that takes ten times as long


def with_a_straggler(bench: Bench, rule: str) -> dict[str, Any]:
    """For the same time by each rule; the last member's steps take it ten times their computation."""
    run = f"{rule}-straggler"
    parts, seconds = bench.parts("iid"), bench.setting.seconds
    jobs = [
        bench.job(
            run,
            RULES[rule],
            number,
            part,
            steps=ENDLESS,
            seconds=seconds,
            slowness=SLOWNESS if number == CLIENTS else 1.0,
        )
        for number, part in enumerate(parts, 1)
    ]
    found = bench.train(jobs)
    tokens_at = counted(bench.state / rule, run)
    points = bench.points(at_marks(found.snapshots, tokens_at), tokens_at)
    told = case(found, points) | {"steps": found.steps}
    # Up to the last merge that was seen: what is under way then would not be counted.
    return told | {"tokens_per_s": told["tokens"] / max(found.snapshots[-1].seconds, 1.0)}


# ---------------------------------------------------------------- the command


def run_rules(bench: Bench, figures: dict[str, Any], rules: Sequence[str], schemes: Sequence[str]) -> None:
    found = figures.setdefault("rules", {})
    for rule in rules:
        with bench.served(rule):
            for scheme in ("all",) if rule == SINGLE else schemes:
                began = time.monotonic()
                if rule in RULES:
                    found[f"{rule}/{scheme}"] = together(bench, rule, scheme)
                else:
                    found[f"{rule}/{scheme}"] = (single if rule == SINGLE else private)(bench, scheme)
                print(f"{rule}/{scheme}: {time.monotonic() - began:.0f} s with measuring", flush=True)
                report(figures)


def run_stragglers(bench: Bench, figures: dict[str, Any], rules: Sequence[str]) -> None:
    found = figures.setdefault("straggler", {})
    figures["seconds"] = bench.setting.seconds
    for rule in rules:
        if rule in RULES:
            with bench.served(rule):
                found[rule] = with_a_straggler(bench, rule)
            report(figures)


def begun(setting: Setting, folder: Path) -> dict[str, Any]:
    """What an earlier call measured with this setting, or nothing."""
    file = folder / "convergence.json"
    if file.is_file():
        figures: dict[str, Any] = json.loads(file.read_text())["figures"]
        if figures["setting"] == setting.told:
            return figures
    return {"setting": setting.told}


def setting_of(asked: argparse.Namespace, scratch: Path) -> Setting:
    if asked.tiny:
        model = lively_model("llama", scratch / "tiny", vocab_size=256)
        given = (24, asked.steps or 6, 2 * len(SOURCES), 1e-2, 0.1, asked.seconds or 2.0)
        return Setting(model, lambda text: list(text.encode()), *given)
    model = bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    given = (asked.tokens, asked.steps or 40, 6 * len(SOURCES), 1e-3, 2.0, asked.seconds or 90.0)
    return Setting(model, lambda text: tokenizer(text)["input_ids"], *given)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = (SINGLE, *RULES, PRIVATE)
    parser.add_argument("--question", choices=("rules", "straggler"), default="rules")
    parser.add_argument("--rules", nargs="+", choices=known, default=known)
    parser.add_argument("--partitions", nargs="+", choices=PARTITIONS, default=PARTITIONS)
    parser.add_argument("--steps", type=int, help="of each client")
    parser.add_argument("--tokens", type=int, default=96, help="of a row")
    parser.add_argument("--seconds", type=float, help="of each rule with a straggler")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that everything works")
    parser.add_argument("--output", type=Path, default=_common.RESULTS)
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    torch.set_num_threads(1)
    _common.RESULTS = asked.output
    asked.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, Clients.started(CLIENTS) as clients:
        setting = setting_of(asked, Path(scratch))
        texts = texts_of(setting.encode, setting.tokens, CLIENTS * setting.steps, setting.held_out_rows, SEED)
        held_out = HeldOut(setting.model, texts.held_out)
        figures = begun(setting, asked.output) | {"before": held_out.loss({})}
        bench = Bench(setting, texts, held_out, figures["before"], clients, Path(scratch))
        if asked.question == "rules":
            run_rules(bench, figures, asked.rules, asked.partitions)
        else:
            run_stragglers(bench, figures, asked.rules)
    if wrong := shortcomings(figures):
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
