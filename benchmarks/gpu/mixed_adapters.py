"""What does a decode step cost where sessions have different LoRA adapters?

Run on a machine with one CUDA GPU: `python benchmarks/gpu/mixed_adapters.py` (`--cpu`: a 135M shape in
float32, one thread). Random weights; the 28 trunk layers of an 8B shape in bfloat16. Sessions of one row
each; a round is one step of each, all of which wait before the first runs. LoRA on all linear layers.

bare    no adapters
one     all sessions have one adapter
mixed   sessions have several adapters, and run in one batch over the bank
apart   the same without a bank: a batch for each adapter
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from splitlearn.config import GIB, BatchingConfig, SessionConfig
from splitlearn.engine.engine import Engine
from splitlearn.model.lora import LoraSlots
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.vocabulary import LoraSettings, StepKey, Versions
from splitlearn.wire.messages import AdapterMessage, OpenSession, StepMessage

LARGE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SMALL: dict[str, Any] = LARGE | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
PROMPT, WARM_UP, ROUNDS, WAIT_S = 32, 5, 20, 300.0
CLIENT = b"bench"
WHAT = ("bare", "one", "mixed", "apart")


def trunk_of(cpu: bool) -> TrunkSegment:
    shape, device = (SMALL, "cpu") if cpu else (LARGE, "cuda")
    torch.set_default_dtype(torch.float32 if cpu else torch.bfloat16)
    with torch.device(device):
        whole = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    torch.set_default_dtype(torch.float32)
    return TrunkSegment.of_whole(whole, SplitPlan(shape["num_hidden_layers"], 2, 2)).eval()


def load(engine: Engine, adapters: int, rank: int) -> None:
    settings = LoraSettings(r=rank, alpha=2.0 * rank, target_modules=("all-linear",))
    slots = LoraSlots(engine.trunk.causal_lm)
    shapes = slots.add("shapes", settings, seed=0)
    slots.remove("shapes")
    for number in range(adapters):
        generator = torch.Generator().manual_seed(number)
        weights = {name: 0.02 * torch.randn(w.shape, generator=generator) for name, w in shapes.items()}
        message = AdapterMessage(f"adapter{number}", 1, settings, weights)
        engine.runs.load_adapter(CLIENT, message).result(WAIT_S)


def seconds_a_round(engine: Engine, sessions: int, adapter_of: Any) -> float:
    size, dtype = engine.trunk.hidden_size, engine.trunk.dtype
    prompt, token = torch.randn(1, PROMPT, size).to(dtype), torch.randn(1, 1, size).to(dtype)

    def submit(step: int) -> list[Any]:
        return [
            engine.submit(
                CLIENT,
                StepMessage(
                    StepKey(session=number + 1, step=step),
                    prompt if step == 1 else token,
                    open=OpenSession(adapter=Versions(adapter_of(number))) if step == 1 else None,
                ),
            )
            for number in range(sessions)
        ]

    taken = []
    for step in range(1, 1 + WARM_UP + ROUNDS):
        started = time.perf_counter()
        # On the engine's thread, so that nothing runs before all of them wait.
        for future in engine._queue.ask(lambda step=step: submit(step)).result(WAIT_S):
            if (error := future.result(WAIT_S).error) is not None:
                raise error
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--sessions", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--modes", nargs="+", default=["off", "default"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    trunk = trunk_of(asked.cpu)
    names = {
        "bare": lambda number: "",
        "one": lambda number: "adapter0",
        "mixed": lambda number: f"adapter{number % asked.adapters}",
        "apart": lambda number: f"adapter{number % asked.adapters}",
    }
    held = SessionConfig(session_tokens=256, kv_budget_bytes=2 * GIB if asked.cpu else 8 * GIB)
    for mode in asked.modes:
        for sessions in asked.sessions:
            for what in WHAT:
                batching = BatchingConfig(adapter_bank_bytes=0 if what == "apart" else 8 * GIB)
                engine = Engine(trunk, batching, held, compile=mode)
                engine.start()
                load(engine, asked.adapters, asked.rank)
                found = {
                    "what": what,
                    "compile": mode,
                    "sessions": sessions,
                    "ms_a_round": round(1e3 * seconds_a_round(engine, sessions, names[what]), 2),
                    "bank_mib": engine.bank.bytes >> 20,
                    "batches": engine.ran.batches,
                }
                print(json.dumps(found), flush=True)
                for number in range(asked.adapters):
                    engine.runs.unload_adapter(CLIENT, f"adapter{number}").result(WAIT_S)
                engine.stop()


if __name__ == "__main__":
    main()
