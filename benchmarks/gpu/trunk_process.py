"""The trunk server of a benchmark in a process of its own, which tells what its engine ran."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Any

import structlog
import torch

from splitlearn import TrunkServer
from splitlearn.bench.worker import do_as_told


class GraphClock:
    """How long the device works on CUDA graphs: an event before each launch and one behind it."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Any, Any]] = []
        self._us = 0.0
        replay = torch.cuda.CUDAGraph.replay

        def timed(graph: Any) -> None:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            replay(graph)
            ended.record()
            self._pairs.append((began, ended))

        torch.cuda.CUDAGraph.replay = timed

    def us(self) -> float:
        """Of all launches so far that are done."""
        done = [pair for pair in tuple(self._pairs) if pair[1].query()]
        del self._pairs[: len(done)]
        self._us += sum(began.elapsed_time(ended) for began, ended in done) * 1e3
        return self._us


class TrunkProcess:
    def __init__(self) -> None:
        self._server: Any = None
        self._graphs: GraphClock | None = None

    def serve(self, model: str, device: str, **settings: Any) -> dict[str, Any]:
        if device == "cuda":
            self._graphs = GraphClock()
        self._server = TrunkServer(model, port=0, device=device, drain_s=1.0, **settings).start()
        weights = self._server.engine.trunk.parameters()
        return {
            "address": self._server.address,
            "weight_bytes": sum(each.numel() * each.element_size() for each in weights),
        }

    def counts(self) -> dict[str, float]:
        """What was run up to now, and when that is; `graphs_us` by CUDA events, of decode steps alone."""
        engine = self._server.engine
        return asdict(engine.ran) | {
            "at_s": time.perf_counter(),
            "graphs_us": self._graphs.us() if self._graphs else 0.0,
            "recorded": engine.graphs.recorded if engine.graphs else 0,
        }

    def cut_prompts(self, tokens: int) -> None:
        """As if the server had been started with this `prefill_chunk_tokens`, without loading it anew."""
        admission = self._server.engine._admission
        assert hasattr(admission, "_chunk_tokens")
        admission._chunk_tokens = tokens

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


if __name__ == "__main__":
    # Lines on stdout are answers.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    process = TrunkProcess()
    do_as_told(process)
    process.stop()
