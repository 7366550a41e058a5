"""Texts by several clients at once over one trunk, beside the whole model's in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from splitlearn.bench.latencies import Latencies, Percentiles
from splitlearn.bench.worker import Worker, all_do, workers
from splitlearn.errors import SettingError

MODULE = "splitlearn.bench.text_worker"


@dataclass(frozen=True, slots=True)
class Texts:
    """How many clients write at once, one number after the other, and how long their texts are."""

    sessions: tuple[int, ...] = (1, 2, 4)
    prompt_tokens: int = 16
    new_tokens: int = 64
    rounds: int = 1

    def __post_init__(self) -> None:
        if not self.sessions or min(*self.sessions, self.prompt_tokens, self.rounds) < 1:
            raise SettingError("sessions, prompt tokens and rounds are 1 or more")
        if self.new_tokens < 2:
            raise SettingError("new tokens are 2 or more: the time between them is measured")


@dataclass(frozen=True, slots=True)
class TextFigures:
    """Tokens a second, the prompt's time included; medians over the rounds.

    The whole model's are 0 where it was not run; the ratio is that of each round's pair, to the whole
    model with as many rows in one batch.
    """

    sessions: int
    tokens: int
    tokens_per_s: float
    tokens_per_s_each: float
    latency: Percentiles
    whole_tokens_per_s: float = 0.0
    whole_alone_tokens_per_s: float = 0.0
    ratio: float = 0.0


@dataclass(frozen=True, slots=True)
class Writers:
    """The clients, and the whole model if it is there."""

    clients: Sequence[Worker]
    whole: Worker | None


@contextmanager
def writers(model: str, trunk: str, most: int, *, dtype: str, codec: str, whole: bool) -> Iterator[Writers]:
    """So many clients of this trunk, in a process each, and the whole model in one more.

    Raises:
        SplitLearnError: what keeps a client from loading, as it would raise it.
    """
    with workers(MODULE, most + whole) as those:
        clients = those[:most]
        all_do(clients, "load_split", model=model, trunk=trunk, dtype=dtype, codec=codec)
        if whole:
            all_do(those[most:], "load_whole", model=model, dtype=dtype)
        yield Writers(clients, those[most] if whole else None)
        all_do(clients, "close")


def write_texts(by: Writers, texts: Texts) -> Iterator[TextFigures]:
    """For each number of sessions the figures, as soon as they are there."""
    for sessions in texts.sessions:
        rounds = [_round(by, texts, sessions) for _ in range(texts.rounds)]
        yield _figures(sessions, rounds)


@dataclass(frozen=True, slots=True)
class _Round:
    tokens: int
    tokens_per_s: float
    latencies: Latencies
    whole_tokens_per_s: float
    whole_alone_tokens_per_s: float


def _round(by: Writers, texts: Texts, sessions: int) -> _Round:
    """The clients side by side, then the whole model alone, so that neither takes the other's processor."""
    length = {"prompt_tokens": texts.prompt_tokens, "new_tokens": texts.new_tokens}
    for number, client in enumerate(by.clients[:sessions]):
        client.ask("generate", seed=number, rows=1, **length)
    told = [client.told() for client in by.clients[:sessions]]
    latencies = Latencies()
    for each in told:
        latencies.add(Latencies({int(number): count for number, count in each["latencies"].items()}))

    def whole(rows: int) -> float:
        return _pace(all_do([by.whole], "generate", seed=0, rows=rows, **length)) if by.whole else 0.0

    together = whole(sessions)
    alone = together if sessions == 1 else whole(1)
    return _Round(sum(each["tokens"] for each in told), _pace(told), latencies, together, alone)


def _pace(told: Sequence[dict[str, Any]]) -> float:
    """Tokens a second from when the first began until the last ended."""
    took_s = max(each["ended"] for each in told) - min(each["began"] for each in told)
    return float(sum(each["tokens"] for each in told) / took_s)


def _figures(sessions: int, rounds: Sequence[_Round]) -> TextFigures:
    def median(name: str) -> float:
        return statistics.median(getattr(each, name) for each in rounds)

    latencies = Latencies()
    for each in rounds:
        latencies.add(each.latencies)
    ratios = [
        each.tokens_per_s / each.whole_tokens_per_s if each.whole_tokens_per_s else 0.0 for each in rounds
    ]
    return TextFigures(
        sessions=sessions,
        tokens=sum(each.tokens for each in rounds),
        tokens_per_s=median("tokens_per_s"),
        tokens_per_s_each=median("tokens_per_s") / sessions,
        latency=latencies.percentiles(),
        whole_tokens_per_s=median("whole_tokens_per_s"),
        whole_alone_tokens_per_s=median("whole_alone_tokens_per_s"),
        ratio=statistics.median(ratios),
    )
