"""Is a round lost or applied twice, and does the ledger alone make the same adapter? Processes are killed."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _cohort import RUN, Cohort, audit, events_of, replayed
from _common import markdown, write
from _kill import zygote
from torch import Tensor

from splitlearn.engine.ledger import rounds
from splitlearn.monitor.events import Event, Lapsed, Returned, RoundClosed
from splitlearn.testing import lively_model
from splitlearn.vocabulary import CohortSettings

YES_NO = {True: "yes", False: "no"}
SETTING = (
    "{members} member processes, {steps} steps each (a tiny llama, LoRA with dropout on the trunk, bottom "
    "and top frozen). One member is killed with -9 at a third and starts again at half; at half the server "
    "is killed with -9 and starts again, and one more member joins. The lease is 2 s; where all these "
    "processes share two cores, leases run out often."
)


def rules(members: int) -> dict[str, CohortSettings]:
    return {
        "sync": CohortSettings("sync", members=members, clip_norm=1.0),
        "quorum": CohortSettings("quorum", members=members, quorum=members // 2 + 1, timeout_s=0.2),
        "carry": CohortSettings(
            "quorum", members=members, quorum=members // 2 + 1, timeout_s=0.05, carry_late=True
        ),
        "async": CohortSettings("async", members=members, staleness_limit=4 * members),
        "buffered": CohortSettings(
            "buffered", members=members, buffer=members // 2 + 1, staleness_limit=4 * members
        ),
    }


def disturbed(
    model: Path, folder: Path, settings: CohortSettings, members: int, steps: int
) -> dict[str, Any]:
    """A member killed at a third and back at half, the server killed at half, and then one more member."""
    cohort = Cohort(zygote(), model, folder, settings, steps)
    names = [f"member-{number:02d}" for number in range(members)]
    began = time.monotonic()
    try:
        cohort.start_server()
        for name in names:
            cohort.start_member(name)
        cohort.until(steps // 3)
        cohort.kill(names[0])
        cohort.until(steps // 2, names[1:])
        cohort.kill("server")
        cohort.start_server()
        cohort.start_member("newcomer")
        cohort.start_member(names[0])
        cohort.until(steps + 1)
        took_s = time.monotonic() - began
    finally:
        cohort.stop()
    # Only now: a server that still writes deletes what is older.
    events = events_of(cohort.store())
    newest = cohort.store().read(RUN, cohort.store().steps(RUN)[-1])
    again = replayed(model, events, settings)
    others = replayed(model, altered(events), settings)
    return {
        "seconds": round(took_s, 1),
        "rounds": len(list(rounds(events))),
        "lapsed": sum(isinstance(each, Lapsed) for each in events),
        "returned": sum(isinstance(each, Returned) for each in events),
        "refused": sum(each.kind == "refused" for each in events),
        "dropped": sum(each.kind == "dropped" for each in events),
        "wrong": audit(events, cohort.told),
        "errors": {name: error for name, error in cohort.ended.items() if error},
        "replayed_equal": equal(again, newest.weights),
        "other_weights_equal": equal(others, newest.weights),
    }


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def altered(events: Sequence[Event]) -> list[Event]:
    """The negative control: one coefficient of the first round is a little off."""
    at = next(at for at, each in enumerate(events) if isinstance(each, RoundClosed))
    closed = events[at]
    assert isinstance(closed, RoundClosed)
    first, *rest = closed.parts
    parts = (replace(first, coefficient=first.coefficient * 1.001), *rest)
    return [*events[:at], replace(closed, parts=parts), *events[at + 1 :]]


def table(found: Mapping[str, Mapping[str, Any]], members: int, steps: int) -> str:
    header = (
        "rule", "seconds", "rounds", "lapsed / returned", "refused / dropped",
        "lost, or applied twice (wanted: none)", "the ledger replayed is the same adapter bit for bit",
        "the same with one coefficient 0.1 % off (control)", "members that ended with an error",
    )  # fmt: skip
    rows = [
        (
            rule,
            each["seconds"],
            each["rounds"],
            f"{each['lapsed']} / {each['returned']}",
            f"{each['refused']} / {each['dropped']}",
            "; ".join(each["wrong"]) or "none",
            YES_NO[each["replayed_equal"]],
            YES_NO[each["other_weights_equal"]],
            "; ".join(f"{name}: {error}" for name, error in each["errors"].items()) or "none",
        )
        for rule, each in found.items()
    ]
    return "\n\n".join((SETTING.format(members=members, steps=steps), markdown(header, rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rule", action="append", choices=sorted(rules(2)))
    told = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as root:
        model = lively_model("llama", Path(root) / "model")
        for rule in told.rule or rules(2):
            folder = Path(root) / rule
            folder.mkdir()
            found[rule] = disturbed(model, folder, rules(told.members)[rule], told.members, told.steps)
            print(rule, found[rule], flush=True)
    write("cohort_kill", found, table(found, told.members, told.steps))
    if any(
        each["wrong"] or each["errors"] or each["other_weights_equal"] or not each["replayed_equal"]
        for each in found.values()
    ):
        sys.exit("a step was lost or counted twice, a member gave up, or the ledger makes another adapter")


if __name__ == "__main__":
    main()
