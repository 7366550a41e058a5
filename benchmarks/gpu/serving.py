"""What does one GPU serve: many sessions, long prompts beside them, training beside them, several clients?

Run on a machine with one CUDA GPU: `python benchmarks/gpu/serving.py` (`--cpu` tries the script with tiny
shapes). Random weights of an 8B shape, bfloat16, split 2/28/2, prompt 128, 100 new tokens; the server and
each client are processes of their own, and there is one server for each of `--modes`:

sessions   the trunk alone: 1, 8 and 32 sessions of one row replay kept activations from 1, 4 and 8 processes
prefill    prompts of 4,096 tokens beside 8 such sessions: how long these wait, by the length of a piece
clients    four clients at once, `generate()` of 8 rows each
cache      `generate()` with the server's KV cache and without, over a link of 1 Gbit/s each way
mixed      one LoRA training run, 4 x 512 tokens, beside 8 such sessions, and each alone

A section that fails or is late is noted, and the others go on with a new server.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from frame import Bench, arguments, deadline

from splitlearn.bench.latencies import Latencies
from splitlearn.bench.load import MODULE as LOAD_PROCESS
from splitlearn.bench.load import Load
from splitlearn.bench.worker import Worker, all_do, workers
from splitlearn.config import BatchingConfig

START_S, COMPILE_S = 150.0, 400.0
"""For all processes and the first graphs; the second where these are compiled."""
WARM_UP_S = 1.0
PROCESSES = {1: 1, 8: 4, 32: 8}
"""Of the load, by its sessions."""
LINK_BYTES_PER_S = 1e9 / 8
LINK_CHECK_BYTES = 16 << 20
# Wanted of them.
TOTAL_TOKENS_PER_S, STEPS_PER_S, OF_ONE_ALONE, BUSY, LONGEST_MS, CACHE_GAIN = 1600, 2000, 0.75, 0.8, 60, 25


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything; the tiny one only tries the script."""

    loads: int = 8
    threads: int = 8
    clients: int = 4
    rows: int = 8
    seconds: float = 4.0
    session_tokens: int = 4352
    kv_budget_bytes: int = 30 << 30
    tape_budget_bytes: int = 24 << 30
    prefill_tokens: int = 4096
    prefill_chunks: tuple[int, ...] = (256, 512, 1024)
    prefills: int = 3
    training: tuple[int, int] = (4, 512)
    prompts: tuple[int, ...] = (128, 1024, 2048)
    uncached_tokens: int = 5


TINY_SIZE = Size(
    loads=2,
    threads=1,
    clients=2,
    rows=2,
    seconds=1.0,
    session_tokens=512,
    kv_budget_bytes=64 << 20,
    tape_budget_bytes=64 << 20,
    prefill_tokens=64,
    prefill_chunks=(8, 16),
    prefills=2,
    training=(2, 16),
    prompts=(8, 16),
    uncached_tokens=2,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """The server, and the processes that use it."""

    bench: Bench
    size: Size
    mode: str
    client_mode: str
    folder: str
    trunk: Worker
    address: str
    weight_bytes: int
    loads: Sequence[Worker]
    clients: Sequence[Worker]
    link: Worker

    def note(self, name: str, **figures: Any) -> None:
        self.bench.note(f"{name}, trunk {self.mode}", **figures)

    def counts(self) -> Counts:
        (told,) = all_do([self.trunk], "counts")
        return Counts(**told)

    def load(self, clients: Sequence[Worker], address: str = "", **settings: Any) -> None:
        settings = {"compile": self.client_mode} | settings
        where = {"model": self.folder, "trunk": address or self.address, "device": self.bench.device}
        all_do(clients, "load", **where, **settings)


@contextmanager
def stage(bench: Bench, folder: str, mode: str, client_mode: str, wait_ms: float) -> Iterator[Stage]:
    size = TINY_SIZE if bench.is_tiny else Size()
    with (
        workers("trunk_process", 1) as (trunk,),
        workers(LOAD_PROCESS, size.loads) as loads,
        workers("client_process", size.clients) as clients,
        workers("link_process", 1) as (link,),
    ):
        started = time.monotonic()
        trunk.ask(
            "serve",
            model=folder,
            device=bench.device,
            compile=mode,
            # A process of this kind has one thread unless it is told otherwise.
            threads=size.threads,
            batching={"wait_ms": wait_ms},
            sessions={"session_tokens": size.session_tokens, "kv_budget_bytes": size.kv_budget_bytes},
            runs={"tape_budget_bytes": size.tape_budget_bytes},
        )
        facts = trunk.told()
        on = Stage(
            bench, size, mode, client_mode, folder, trunk, **facts, loads=loads, clients=clients, link=link
        )
        # Every shape of a batch is met once.
        for sessions in (1, 8, 32):
            step_alone(on, sessions, 0.5)
        on.note("server ready", seconds=time.monotonic() - started, recorded=on.counts().recorded)
        yield on


# ---------------------------------------------------------------- the load


@dataclass(frozen=True, slots=True)
class Counts:
    """What the engine ran up to a time, batches of sessions' steps alone; or between two times."""

    at_s: float
    batches: int
    steps: int
    rows: int
    device_us: int
    graphs_us: float
    recorded: int
    shared: int
    ragged: int
    mixed: int

    def since(self, before: Counts) -> Counts:
        return Counts(*(getattr(self, name) - getattr(before, name) for name in self.__slots__))

    def figures(self, weight_bytes: int) -> dict[str, float]:
        """`busy` by the engine's own clock around its batches, `busy_graphs` by events around the graphs."""
        return {
            "busy": self.device_us / 1e6 / self.at_s,
            "busy_graphs": self.graphs_us / 1e6 / self.at_s,
            "weights_gb_per_s": weight_bytes * self.batches / self.at_s / 1e9,
            "rows_per_batch": self.rows / max(self.batches, 1),
            "batches_per_s": self.batches / self.at_s,
            "batch_ms": self.device_us / 1e3 / max(self.batches, 1),
            "recorded_meanwhile": self.recorded,
        }


@dataclass(slots=True)
class Stepped:
    """What sessions' steps came to, all processes together; filled in when they have ended."""

    seconds: float
    latencies: Latencies
    errors: Counter[str]
    answers: dict[int, list[float]]
    """When they came, by session."""
    generator_use: float = 0.0

    def per_s(self, began: float, ended: float) -> float:
        came = sum(began <= at <= ended for those in self.answers.values() for at in those)
        return came / (ended - began)

    def waits(self, spans: Sequence[tuple[float, float]]) -> tuple[Latencies, Latencies]:
        """Between two answers of a session: those that touch one of the spans, and the others."""
        within, without = Latencies(), Latencies()
        for those in self.answers.values():
            for earlier, later in pairwise(sorted(those)):
                touches = any(earlier < ended and later > began for began, ended in spans)
                (within if touches else without).note(later - earlier)
        return within, without


@contextmanager
def stepping(on: Stage, sessions: int, seconds: float) -> Iterator[Stepped]:
    """Sessions of one row that step as fast as their answers come, warmed up, while the block runs."""
    load = Load(
        sessions=sessions,
        processes=min(PROCESSES[sessions], on.size.loads),
        prompt_tokens=on.bench.prompt,
        # Always the same shapes: no row's columns outgrow the next power of two.
        text_tokens=2 * on.bench.prompt,
    )
    those = on.loads[: load.processes]
    for number, worker in enumerate(those):
        worker.ask("open", address=on.address, prompts=load.prompts_of(number), text_tokens=load.text_tokens)
    for worker in those:
        worker.told()
    for worker in those:
        worker.ask("run", warm_up_s=WARM_UP_S, seconds=seconds)
    stepped = Stepped(seconds, Latencies(), Counter(), defaultdict(list))
    time.sleep(WARM_UP_S + 0.1)
    yield stepped
    told = [worker.told() for worker in those]
    all_do(those, "close")
    for each in told:
        stepped.latencies.add(Latencies({int(number): count for number, count in each["latencies"].items()}))
        stepped.errors.update(each["errors"])
        for at_s, session, _ in each["sample"]:
            stepped.answers[session].append(at_s)
    stepped.generator_use = sum(each["processor_s"] for each in told) / len(told) / seconds


def step_alone(on: Stage, sessions: int, seconds: float) -> Stepped:
    with stepping(on, sessions, seconds) as stepped:
        pass
    return stepped


def longest_ms(waits: Latencies) -> float:
    return waits.within_s(1.0) * 1e3


# ---------------------------------------------------------------- sections


def sessions(on: Stage) -> None:
    each: dict[int, float] = {}
    wanted = {8: {"wanted_of_one_alone": OF_ONE_ALONE}, 32: {"wanted": STEPS_PER_S, "wanted_busy": BUSY}}
    for number in PROCESSES:
        with stepping(on, number, on.size.seconds) as stepped:
            before = on.counts()
            time.sleep(0.8 * on.size.seconds - 0.1)
            ran = on.counts().since(before)
        steps_per_s = len(stepped.latencies) / stepped.seconds
        each[number] = steps_per_s / number
        percentiles = stepped.latencies.percentiles()
        on.note(
            f"sessions {number}",
            steps_per_s=steps_per_s,
            each_per_s=each[number],
            of_one_alone=each[number] / each[1] if each[1] else 0.0,
            p50_ms=percentiles.p50_ms,
            p99_ms=percentiles.p99_ms,
            failed=stepped.errors.total(),
            errors=dict(stepped.errors),
            generator_use=stepped.generator_use,
            **ran.figures(on.weight_bytes),
            **wanted.get(number, {}),
        )


def prefill(on: Stage) -> None:
    """The waits are those between two answers of a decoding session while a prompt is under way."""
    client, size = on.clients[0], on.size
    usual = BatchingConfig().chunk_tokens(on.bench.device)
    pause_s = size.seconds / 20
    asked = {"address": on.address, "tokens": size.prefill_tokens}
    try:
        for chunk in size.prefill_chunks:
            all_do([on.trunk], "cut_prompts", tokens=chunk)
            (alone,) = all_do([client], "prefill", **asked, times=1, pause_s=0.0)
            with stepping(on, 8, 1.5 * size.seconds) as stepped:
                (told,) = all_do([client], "prefill", **asked, times=size.prefills, pause_s=pause_s)
            until = max(max(those) for those in stepped.answers.values())
            spans = [(each["began"], each["ended"]) for each in told if each["ended"] <= until]
            within, without = stepped.waits(spans)
            took = [each["ended"] - each["began"] for each in told]
            on.note(
                f"prefill of {size.prefill_tokens} in pieces of {chunk}{' (default)' * (chunk == usual)}",
                longest_ms=longest_ms(within),
                wanted=LONGEST_MS,
                p99_ms=within.percentiles().p99_ms,
                p50_ms=within.percentiles().p50_ms,
                waits=len(within),
                prefill_ms=sum(took) / len(took) * 1e3,
                prefill_alone_ms=(alone[0]["ended"] - alone[0]["began"]) * 1e3,
                prefill_device_ms=sum(each["device_ms"] for each in told) / len(told),
                prefills=len(spans),
                longest_otherwise_ms=longest_ms(without),
                p50_otherwise_ms=without.percentiles().p50_ms,
                failed=stepped.errors.total(),
            )
    finally:
        all_do([on.trunk], "cut_prompts", tokens=usual)


def mixed(on: Stage) -> None:
    trainer = on.clients[:1]
    rows, tokens = on.size.training
    training = {"rows": rows, "tokens": tokens, "seconds": on.size.seconds}
    on.load(trainer, lora_r=8)
    (alone,) = all_do(trainer, "train", **training)
    stepped = step_alone(on, 8, on.size.seconds / 2)
    decode_alone = len(stepped.latencies) / stepped.seconds
    steps_alone = alone["steps"] / (alone["ended"] - alone["began"])
    # The trainer's first steps, and its last one, take their time, too.
    with stepping(on, 8, 2.5 * on.size.seconds) as stepped:
        (beside,) = all_do(trainer, "train", **training)
    span = beside["began"], min(beside["ended"], max(max(those) for those in stepped.answers.values()))
    steps_per_s = beside["steps"] / (beside["ended"] - beside["began"])
    decode = stepped.per_s(*span)
    within, _ = stepped.waits([span])
    on.note(
        f"mixed, training {rows} x {tokens} beside 8 sessions",
        decode_steps_per_s=decode,
        decode_alone_per_s=decode_alone,
        decode_share=decode / decode_alone,
        training_steps_per_s=steps_per_s,
        training_alone_per_s=steps_alone,
        training_share=steps_per_s / steps_alone,
        shares=decode / decode_alone + steps_per_s / steps_alone,
        decode_p50_ms=within.percentiles().p50_ms,
        decode_p99_ms=within.percentiles().p99_ms,
        failed=stepped.errors.total(),
    )
    all_do(trainer, "unload")


def clients(on: Stage) -> None:
    rows = on.size.rows
    asked = {"rows": rows, "prompt_tokens": on.bench.prompt, "new_tokens": on.bench.new}
    on.load(on.clients)
    all_do(on.clients, "generate", **asked)
    for turn in (1, 2):
        before = on.counts()
        told = all_do(on.clients, "generate", **asked)
        ran = on.counts().since(before)
        took_s = max(each["ended"] for each in told) - min(each["began"] for each in told)
        tokens_per_s = sum(each["tokens"] for each in told) / took_s
        on.note(
            f"clients, {len(told)} x {rows} rows, client {on.client_mode}, round {turn}",
            tokens_per_s=tokens_per_s,
            wanted=TOTAL_TOKENS_PER_S,
            token_ms=1e3 * took_s / on.bench.new,
            slowest_s=max(each["ended"] - each["began"] for each in told),
            fastest_s=min(each["ended"] - each["began"] for each in told),
            **ran.figures(on.weight_bytes),
        )
    alone = all_do(on.clients[:1], "generate", **asked)[0]
    on.note(
        f"clients, 1 x {rows} rows, client {on.client_mode}",
        tokens_per_s=alone["tokens"] / (alone["ended"] - alone["began"]),
        trunk_ms=alone["trunk_ms"],
    )
    all_do(on.clients, "unload")


def cache(on: Stage) -> None:
    """Without a cache a few tokens in the text's middle, whose mean cost is that of all."""
    client, new = on.clients[:1], on.bench.new
    few = on.size.uncached_tokens
    (address,) = all_do([on.link], "open", address=on.address, bytes_per_s=LINK_BYTES_PER_S)
    on.load(client, address)
    (link_rate,) = all_do([on.link], "rate", bytes_per_s=LINK_BYTES_PER_S, size=LINK_CHECK_BYTES)

    def tokens_per_s(prompt: int, tokens: int, **how: Any) -> float:
        (told,) = all_do(client, "generate", rows=1, prompt_tokens=prompt, new_tokens=tokens, **how)
        return told["tokens"] / (told["ended"] - told["began"])

    for prompt in on.size.prompts:
        tokens_per_s(prompt, new)
        cached = tokens_per_s(prompt, new)
        middle = prompt + (new - few) // 2
        tokens_per_s(middle, 1, use_cache=False)
        uncached = tokens_per_s(middle, few, use_cache=False)
        on.note(
            f"cache, prompt {prompt}, 1 Gbit/s, client {on.client_mode}",
            cached_tokens_per_s=cached,
            uncached_tokens_per_s=uncached,
            gain=cached / uncached,
            link_gbit_per_s=link_rate * 8 / 1e9,
            **({"wanted": CACHE_GAIN} if prompt == max(on.size.prompts) else {}),
        )
    all_do(client, "unload")


# ---------------------------------------------------------------- all

SECTIONS: dict[str, tuple[Callable[[Stage], None], float]] = {
    "sessions": (sessions, 60.0),
    "prefill": (prefill, 75.0),
    "clients": (clients, 90.0),
    "cache": (cache, 100.0),
    # Last: the server's process keeps the memory that training took.
    "mixed": (mixed, 90.0),
}
"""Each with its seconds."""


def run_all(sections: Sequence[str], bench: Bench, start: Callable[[], Any], start_s: float) -> None:
    """In turn on one stage; what fails ends that, and the rest has a new one."""
    left = list(sections)
    while left:
        name = "start"
        try:
            with ExitStack() as ends:
                with deadline(start_s):
                    on = ends.enter_context(start())
                while left:
                    name = left.pop(0)
                    run, seconds = SECTIONS[name]
                    began = time.monotonic()
                    with deadline(seconds):
                        run(on)
                    on.note(f"{name} done", seconds=time.monotonic() - began)
        except Exception as error:
            bench.note_failure(name, error)
            if name == "start":
                return


def main() -> None:
    parser = arguments(__doc__, tuple(SECTIONS), ["default"])
    parser.add_argument("--client-mode", default="default", help="the same of the clients: off, default")
    parser.add_argument("--wait-ms", type=float, default=BatchingConfig().wait_ms, help="of the server")
    given = parser.parse_args()
    bench = Bench(given)
    with bench.model() as folder:
        for mode in given.modes:
            run_all(
                given.only,
                bench,
                lambda mode=mode: stage(bench, folder, mode, given.client_mode, given.wait_ms),
                COMPILE_S if mode == "max" else START_S,
            )
    bench.table()


if __name__ == "__main__":
    main()
