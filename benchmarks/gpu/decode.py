"""What does decoding through the cut cost on a GPU, against the whole model's `generate()` there?

Run on a machine with one CUDA GPU: `python benchmarks/gpu/decode.py` (`--cpu` tries the script with tiny
shapes). Random weights of an 8B shape, bfloat16, split 2/28/2, prompt 128, 100 new tokens:

trunk      the engine's decode step alone: eager, as a graph, compiled and as a graph
whole      the whole model's `generate()`: as it is, and with a static cache and compiled
split      the library's `generate()` over the split model, client and server as two processes
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from frame import MODES, Bench, arguments
from transformers import AutoModelForCausalLM

from splitlearn.bench.worker import all_do, workers

ROWS = (1, 8, 32)
WAIT_S = 300.0
WARM_UP, MEASURED = 5, 5
"""Generations, of the whole model and the split one alike."""


# ---------------------------------------------------------------- trunk


def trunk(bench: Bench, folder: str, modes: tuple[str, ...]) -> None:
    """Milliseconds of the engine's decode step, as its answers tell them, and from outside."""
    from splitlearn.config import BatchingConfig, SessionConfig
    from splitlearn.engine.engine import Engine
    from splitlearn.model.checkpoint import Checkpoint
    from splitlearn.model.plan import SplitPlan
    from splitlearn.model.weights import load_trunk
    from splitlearn.vocabulary import StepKey
    from splitlearn.wire.messages import OpenSession, StepMessage

    checkpoint = Checkpoint.open(folder)
    segment = load_trunk(
        checkpoint, SplitPlan.for_config(checkpoint.config), dtype=bench.dtype, device=bench.device
    )
    sessions = SessionConfig(
        session_tokens=512, kv_budget_bytes=8 << 30 if bench.device == "cuda" else 64 << 20
    )
    reference: dict[int, torch.Tensor] = {}
    for mode in modes:
        engine = Engine(segment, BatchingConfig(), sessions, compile=mode)
        engine.start()
        for rows in ROWS:
            generator = torch.Generator().manual_seed(1)
            size = bench.shape["hidden_size"]
            prompt = torch.randn(rows, bench.prompt, size, generator=generator).to(bench.dtype)
            token = torch.randn(rows, 1, size, generator=generator).to(bench.dtype)

            def ask(step: int, state: torch.Tensor, rows: int = rows, engine: Engine = engine) -> Any:
                key = StepKey(session=rows, step=step)
                message = StepMessage(key, state, open=OpenSession() if step == 1 else None)
                answer = engine.submit(b"c" * 16, message).result(WAIT_S)
                if answer.error is not None:
                    raise answer.error
                return answer

            ask(1, prompt)
            device, outside = [], []
            for step in range(2, bench.new):
                started = time.perf_counter()
                answer = ask(step, token)
                outside.append((time.perf_counter() - started) * 1e3)
                device.append(answer.timings.device_us / 1e3)
            out = answer.activation_BTD.float().cpu()
            apart = float((out - reference.setdefault(rows, out)).abs().max() / reference[rows].abs().max())
            bench.note(
                f"trunk {mode}",
                rows=rows,
                ms=statistics.median(device[len(device) // 5 :]),
                outside_ms=statistics.median(outside[len(outside) // 5 :]),
                first_ms=outside[0],
                apart=apart,
            )
        engine.stop()
        del engine
        bench.free()


# ---------------------------------------------------------------- whole


def tokens_per_s(bench: Bench, model: Any, rows: int, **how: Any) -> float:
    asked = {"max_new_tokens": bench.new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | how
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, bench.shape["vocab_size"], (rows, bench.prompt), generator=generator)
    ids = ids.to(bench.device)

    def once() -> float:
        bench.synchronize()
        started = time.perf_counter()
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
        bench.synchronize()
        taken = time.perf_counter() - started
        assert text.shape[1] == bench.prompt + bench.new
        return rows * bench.new / taken

    # The first generations of a process are slower than its later ones by up to 3 % (9.48 ms, then 9.20).
    for _ in range(WARM_UP if bench.device == "cuda" else 1):
        once()
    return statistics.median(once() for _ in range(1 if bench.is_tiny else MEASURED))


def whole(bench: Bench, folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=bench.dtype).to(bench.device).eval()
    bench.note("whole generate", rows=1, tokens_per_s=tokens_per_s(bench, model, 1))
    static = tokens_per_s(bench, model, 1, cache_implementation="static")
    bench.note("whole generate, static cache and compile", rows=1, tokens_per_s=static)
    del model
    torch._dynamo.reset()
    bench.free()


# ---------------------------------------------------------------- split


def split(bench: Bench, folder: str, modes: tuple[str, ...], client_modes: tuple[str, ...]) -> None:
    from splitlearn import AutoSplitModelForCausalLM

    budget = 8 << 30 if bench.device == "cuda" else 64 << 20
    for mode in modes:
        with workers("trunk_process", 1) as (trunk,):
            how = {"sessions": {"session_tokens": 512, "kv_budget_bytes": budget}, "compile": mode}
            started = time.monotonic()
            (facts,) = all_do([trunk], "serve", model=folder, device=bench.device, **how)
            bench.note(f"trunk {mode} serves", seconds=time.monotonic() - started)
            for ours in client_modes:
                model = AutoSplitModelForCausalLM.from_pretrained(
                    folder, trunk=facts["address"], device=bench.device, compile=ours
                )
                speed = tokens_per_s(bench, model, 1)
                timings = model.trunk.last_timings
                bench.note(
                    f"split generate, trunk {mode}, client {ours}",
                    rows=1,
                    tokens_per_s=speed,
                    ms=1e3 / speed,
                    trunk_ms=timings.device_us / 1e3,
                )
                if bench.device == "cuda" and ours != "off":
                    client_apart(bench, model, ours)
                model.close()
                del model
                bench.free()


def client_apart(bench: Bench, model: Any, mode: str) -> None:
    """Where a token's time goes outside of the trunk: the client's two graphs, the way, the loop."""
    graphs = model.decode_graphs
    recorded = next(iter(graphs._graphs.values()))._recorded
    below, above = (device_ms(part.replay) for part in (recorded._bottom, recorded._top))
    crossings, trunk = [], []
    exchange = graphs._exchange

    def timed_exchange(*args: Any) -> torch.Tensor:
        bench.synchronize()
        started = time.perf_counter()
        answer = exchange(*args)
        crossings.append((time.perf_counter() - started) * 1e3)
        trunk.append(model.trunk.last_timings.device_us / 1e3)
        return answer

    graphs._exchange = timed_exchange
    ms = 1e3 / tokens_per_s(bench, model, 1)
    crossing, device = statistics.median(crossings), statistics.median(trunk)
    bench.note(
        f"client {mode} apart",
        ms=ms,
        bottom_ms=below,
        top_ms=above,
        trunk_ms=device,
        way_ms=crossing - device,
        rest_ms=ms - crossing - below - above,
    )


def device_ms(work: Callable[[], object], times: int = 50) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    work()
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / times


# ---------------------------------------------------------------- all


def main() -> None:
    parser = arguments(__doc__, ("trunk", "whole", "split"), MODES)
    parser.add_argument("--client-modes", nargs="+", default=["off"], help="the same of the client")
    given = parser.parse_args()
    bench = Bench(given)
    with bench.model() as folder:
        sections: dict[str, Callable[[], None]] = {
            "trunk": lambda: trunk(bench, folder, tuple(given.modes)),
            "whole": lambda: whole(bench, folder),
            "split": lambda: split(bench, folder, tuple(given.modes), tuple(given.client_modes)),
        }
        for section in given.only:
            try:
                sections[section]()
            except Exception as error:
                bench.note_failure(section, error)
    bench.table()


if __name__ == "__main__":
    main()
