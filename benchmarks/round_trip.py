"""Where does a decode step's time go beside the trunk's own work?

One row of 8 KB (hidden size 2048, float32) through a tiny trunk, client and server as two processes with one
thread each. Wall time is RemoteTrunk's; what the server reports as device time is taken off. Beside it, in
the same run: 8 KB there and back over a bare gRPC stream (no messages of ours, no tensors), at once one after
another, and with a pause between, in which the threads fall asleep as they do in a decode loop.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import queue
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import torch
from _common import markdown, serving, write
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from splitlearn import AutoSplitModelForCausalLM
from splitlearn.client import grpc_transport
from splitlearn.client.remote_trunk import RemoteTrunk

STEPS, WARM_UP = 2000, 200
PAUSE_S = 0.003
WANTED_MS = 1.0
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 2048,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


class Stopwatch:
    """Wraps functions so that each call's time is noted under a name, in microseconds."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)

    def on(self, owner: object, attribute: str, name: str) -> None:
        timed = getattr(owner, attribute)

        def wrapper(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            try:
                return timed(*args, **kwargs)
            finally:
                self.times[name].append((time.perf_counter() - started) * 1e6)

        setattr(owner, attribute, wrapper)


def run(folder: Path, address: str) -> dict[str, float]:
    model = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=address)
    watch = Stopwatch()
    watch.on(RemoteTrunk, "exchange", "wall")
    watch.on(grpc_transport, "step_to_proto", "client encodes")
    watch.on(grpc_transport, "answer_from_proto", "client decodes")
    server: dict[str, list[float]] = defaultdict(list)
    cache, ids = DynamicCache(config=model.config), torch.ones(1, 1, dtype=torch.long)
    with torch.inference_mode():
        for _ in range(STEPS):
            model(ids, past_key_values=cache, use_cache=True)
            timings = model.trunk.last_timings
            server["device"].append(timings.device_us)
            server["server waits for its turn"].append(timings.queued_us)
            server["server encodes"].append(timings.copied_us)
    model.close()
    parts = {name: statistics.median(times[WARM_UP:]) for name, times in (watch.times | server).items()}
    wall, device = watch.times["wall"], server["device"]
    over = [a - b for a, b in zip(wall, device, strict=True)][WARM_UP:]
    parts["wall less device"] = statistics.median(over)
    parts["p99 of wall less device"] = statistics.quantiles(over, n=100)[98]
    known = ("client encodes", "client decodes", "server waits for its turn", "server encodes")
    parts["gRPC, threads and the rest"] = parts["wall less device"] - sum(parts[name] for name in known)
    return parts


def echo(port: multiprocessing.Queue) -> None:
    """A server that gives back what it gets."""

    async def serve() -> None:
        async def bidi(requests: Any, context: Any) -> Any:
            async for request in requests:
                yield request

        server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(bidi)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Echo", {"Bidi": handler}),))
        port.put(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


def bare_stream(pauses_s: Sequence[float]) -> list[float]:
    """Median microseconds of a round trip for each pause between two."""
    context = multiprocessing.get_context("spawn")
    port, medians = context.Queue(), []
    server = context.Process(target=echo, args=(port,), daemon=True)
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port.get(timeout=60)}") as channel:
        requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        call = channel.stream_stream("/Echo/Bidi")(iter(requests.get, None))
        for pause_s in pauses_s:
            times = []
            for _ in range(STEPS // 2):
                time.sleep(pause_s)
                started = time.perf_counter()
                requests.put(bytes(8192))
                next(call)
                times.append((time.perf_counter() - started) * 1e6)
            medians.append(statistics.median(times[WARM_UP:]))
    server.terminate()
    return medians


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
        with serving(Path(folder)) as server:
            parts = run(Path(folder), server.address)
    at_once, paused = bare_stream([0, PAUSE_S])
    parts["bare stream, at once"] = at_once
    parts["bare stream, with a pause"] = paused
    order = (
        "wall", "device", "wall less device", "client encodes", "server waits for its turn", "server encodes",
        "client decodes", "gRPC, threads and the rest", "p99 of wall less device", "bare stream, at once",
        "bare stream, with a pause",
    )  # fmt: skip
    rows = [(name, f"{parts[name] / 1000:.3f}") for name in order]
    header = ("part of a decode step of 8 KB", f"median, ms (wanted: wall less device <= {WANTED_MS:.1f})")
    write("round_trip", parts, markdown(header, rows))


if __name__ == "__main__":
    main()
