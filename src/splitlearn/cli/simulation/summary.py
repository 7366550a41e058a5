"""What came of a simulation: each client's steps and loss, and what became of its gradients."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn.monitor.events import Dropped, Event, Refused, RoundClosed, Skipped, event_of

if TYPE_CHECKING:
    from splitlearn.cli.simulation.clients import Client
    from splitlearn.cli.simulation.config import Simulation
    from splitlearn.cli.simulation.folder import Folder

LEDGER = "ledger.jsonl"


@dataclass(frozen=True, slots=True)
class ClientSummary:
    """One client, over all of its starts; losses are means in nats a token.

    `merged` of its gradients are in rounds, `dropped` came too late, `refused` were computed again, `skipped`
    it gave up itself; `mean_staleness` is that of the merged ones, in versions.
    """

    name: str
    examples: int
    steps: int
    is_done: bool
    starts: int
    kills: int
    tokens: int
    losses: tuple[float, ...]
    held_out_loss: float | None
    merged: int
    dropped: int
    refused: int
    skipped: int
    mean_staleness: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """A simulation that has ended.

    `held_out_loss_before` is the model's, without an adapter; `held_out_loss` the mean over the clients that
    are done, each with its own bottom and top and the trunk as it was in the end.
    """

    output: str
    rule: str
    seconds: float
    rounds: int
    held_out_loss_before: float | None
    held_out_loss: float | None
    clients: tuple[ClientSummary, ...]

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def summary_of(config: Simulation, folder: Folder, clients: Sequence[Client], seconds: float) -> Summary:
    events = list(ledger_of(folder.server_state))
    counted = tuple(
        _client_summary(client, examples, events)
        for client, examples in zip(clients, folder.examples, strict=True)
    )
    before = [each.ended.held_out_loss_before for each in clients if each.ended is not None]
    after = [each.held_out_loss for each in counted if each.held_out_loss is not None]
    return Summary(
        str(config.output),
        config.cohort.rule,
        seconds,
        sum(isinstance(event, RoundClosed) for event in events),
        next((loss for loss in before if loss is not None), None),
        sum(after) / len(after) if after else None,
        counted,
    )


def ledger_of(state: Path) -> Iterable[Event]:
    """What the server wrote of the cohort, in order."""
    for file in sorted(state.rglob(LEDGER)):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield event_of(json.loads(line))


def _client_summary(client: Client, examples: int, events: Sequence[Event]) -> ClientSummary:
    rounds = (event for event in events if isinstance(event, RoundClosed))
    merged = [part.staleness for each in rounds for part in each.parts if part.member == client.name]
    others: Counter[type[Any]] = Counter(
        type(event) for event in events if getattr(event, "member", None) == client.name
    )
    return ClientSummary(
        name=client.name,
        examples=examples,
        steps=client.step,
        is_done=client.ended is not None,
        starts=client.starts,
        kills=client.kills,
        tokens=client.tokens,
        losses=tuple(client.losses),
        held_out_loss=None if client.ended is None else client.ended.held_out_loss,
        merged=len(merged),
        dropped=others[Dropped],
        refused=others[Refused],
        skipped=others[Skipped],
        mean_staleness=sum(merged) / len(merged) if merged else None,
    )
