"""A load on a trunk: many sessions decode at once from kept activations; how many steps, and how fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from splitlearn.bench.batches import Answered, steps_per_batch
from splitlearn.bench.latencies import Latencies, Percentiles
from splitlearn.bench.worker import Worker, all_do, workers
from splitlearn.client.calls import describe
from splitlearn.config import ClientConfig
from splitlearn.errors import SettingError

MODULE = "splitlearn.bench.load_worker"
WARM_UP_S = 1.0


@dataclass(frozen=True, slots=True)
class Load:
    """Sessions of one row whose prompts have `prompt_tokens` to twice as many tokens, so that rows differ.

    Each is cropped back to its prompt when it holds `text_tokens`.
    """

    sessions: int = 20
    seconds: float = 10.0
    processes: int = 1
    prompt_tokens: int = 16
    text_tokens: int = 256

    def __post_init__(self) -> None:
        if min(self.sessions, self.seconds, self.processes, self.prompt_tokens) <= 0:
            raise SettingError("a load has sessions, seconds, processes and prompt tokens, each above 0")
        if self.text_tokens <= max(self.prompts):
            raise SettingError(
                f"texts of {self.text_tokens} tokens leave no room behind a prompt of {max(self.prompts)}: "
                "raise the text tokens or lower the prompt tokens"
            )

    @property
    def prompts(self) -> list[int]:
        """Tokens of each session's prompt."""
        return [self.prompt_tokens + number % self.prompt_tokens for number in range(self.sessions)]

    def prompts_of(self, process: int) -> list[int]:
        return self.prompts[process :: self.processes]


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """What the trunk did under a load.

    `errors` has the kinds of those that `failed`. `queued_ms` and `device_ms` are the server's own means a
    step; `generator_use` is the share of a processor that each process of the load took: near 1 the load is
    the limit, not the trunk.
    """

    sessions: int
    steps: int
    steps_per_s: float
    latency: Percentiles
    failed: int
    errors: dict[str, int]
    steps_per_batch: float
    queued_ms: float
    device_ms: float
    generator_use: float


def put_load(address: str, load: Load) -> LoadFigures:
    """Open the sessions, let them step, and count.

    Raises:
        TrunkUnreachable, NotATrunk: no trunk answers there.
        SettingError: its sessions are too short for the texts.
        KvBudgetExceeded, ResourceExhausted: it takes fewer sessions than these.
    """
    _require_room(address, load)
    with workers(MODULE, min(load.processes, load.sessions)) as those:
        _open(those, address, load)
        told = all_do(those, "run", warm_up_s=WARM_UP_S, seconds=load.seconds)
        all_do(those, "close")
    return _figures(load, told)


def _require_room(address: str, load: Load) -> None:
    facts = describe(address, ClientConfig().connect_s)
    longest = min(facts.session_tokens, facts.max_positions or facts.session_tokens)
    if load.text_tokens > longest:
        raise SettingError(
            f"texts of {load.text_tokens} tokens, {address} takes {longest}: lower the text tokens, "
            "or start it with a larger --session-tokens"
        )


def _open(those: Sequence[Worker], address: str, load: Load) -> None:
    for number, worker in enumerate(those):
        worker.ask("open", address=address, prompts=load.prompts_of(number), text_tokens=load.text_tokens)
    for worker in those:
        worker.told()


def _figures(load: Load, told: Sequence[dict[str, Any]]) -> LoadFigures:
    latencies, errors = Latencies(), Counter[str]()
    for each in told:
        # JSON's keys are strings.
        latencies.add(Latencies({int(number): count for number, count in each["latencies"].items()}))
        errors.update(each["errors"])
    steps = len(latencies)

    def mean_ms(name: str) -> float:
        return sum(each[name] for each in told) / max(steps, 1) / 1000

    return LoadFigures(
        sessions=load.sessions,
        steps=steps,
        steps_per_s=steps / load.seconds,
        latency=latencies.percentiles(),
        failed=errors.total(),
        errors=dict(errors),
        steps_per_batch=steps_per_batch(Answered(*answer) for each in told for answer in each["sample"]),
        queued_ms=mean_ms("queued_us"),
        device_ms=mean_ms("device_us"),
        generator_use=sum(each["processor_s"] for each in told) / len(told) / load.seconds,
    )
