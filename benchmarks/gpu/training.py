"""What does training through the cut cost on a GPU, and what do attention, recomputing and compiling change?

Run on a machine with one CUDA GPU: `python benchmarks/gpu/training.py` (`--cpu` tries the script with tiny
shapes). Random weights of a 1B shape, LoRA r=16 on attention, 8 x 1,024 tokens, dropout 0:

gradients    tiny models on this device against autograd of the whole model
parity       20 steps of SplitTrainer against PEFT and Trainer, a 135M shape: float32, bfloat16 and float16
crossing     one activation over the loopback: a socket, a gRPC stream, and our own step of a run
step         the whole model's step against the split one's (2/12/2, two processes), and where its time goes
trunk        the trunk's step alone: eager and SDPA, recomputed, compiled, bfloat16 and float32
"""

from __future__ import annotations

import argparse
import gc
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SOURCES = Path(__file__).resolve().parents[2] / "src"
sys.path.insert(0, str(SOURCES))

FAMILIES = ("llama", "gemma3_text", "gpt2", "qwen2_moe", "mistral")
SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
    "tie_word_embeddings": True,
}
TINY = SHAPE | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "num_hidden_layers": 6}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
WAIT_S = 300.0
SECTIONS = ["gradients", "parity", "crossing", "step", "compile", "trunk"]


class Bench:
    """Shapes and device, and what was found."""

    def __init__(self, cpu: bool) -> None:
        self.device = "cpu" if cpu else "cuda"
        self.shape = TINY if cpu else SHAPE
        self.rows, self.tokens = (2, 16) if cpu else (8, 1024)
        self.steps, self.warm_up = (2, 1) if cpu else (6, 2)
        self.dtype = torch.float32 if cpu else torch.bfloat16
        self.found: dict[str, Any] = {}

    def note(self, name: str, **figures: Any) -> None:
        self.found[name] = figures
        print(json.dumps({"what": name} | figures), flush=True)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else 0.0

    def ids(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, self.shape["vocab_size"], (self.rows, self.tokens), generator=generator)

    def lora(self) -> LoraConfig:
        return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=ATTENTION)


# ---------------------------------------------------------------- gradients


def gradients(bench: Bench) -> None:
    from splitlearn import AutoSplitModelForCausalLM, TrunkServer
    from splitlearn.testing.gradients import adapted, furthest, gradients_of_split, gradients_of_whole
    from splitlearn.testing.tiny import tiny_model

    ids = torch.randint(4, 128, (2, 12), generator=torch.Generator().manual_seed(1)).to(bench.device)
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = tiny_model(family, temporary)
            sessions = {"session_tokens": 64, "kv_budget_bytes": 64 << 20}
            with TrunkServer(folder, port=0, device=bench.device, sessions=sessions) as server:
                whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                split = AutoSplitModelForCausalLM.from_pretrained(
                    folder, trunk=server.address, device=bench.device
                )
                whole = whole.to(bench.device).eval()
                adapted(whole, split, server.engine, LoraConfig(r=4, target_modules="all-linear"))
                for model in (whole, split):
                    model(ids, labels=ids, use_cache=False).loss.backward()
                apart = furthest(gradients_of_split(split, server.engine), gradients_of_whole(whole))
                split.close()
        bench.note(f"gradients {family}", relative=apart)


# ---------------------------------------------------------------- parity

SMALL = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
OVERFLOWS_AT = 7


class Overflowing:
    """One step of a float16 run whose loss is far too large for its gradients."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * 1e30 if self.args.fp16 and self.state.global_step == OVERFLOWS_AT else loss


def parity(bench: Bench) -> None:
    from transformers import Trainer, TrainingArguments

    from splitlearn import AutoSplitModelForCausalLM, SplitTrainer, TrunkServer
    from splitlearn.model.lora import ADAPTER, add_lora, settings_of, weights_of

    shape = bench.shape if bench.device == "cpu" else SMALL
    rows = torch.randint(3, shape["vocab_size"], (80, 64), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    whole_class = type("Whole", (Overflowing, Trainer), {})
    split_class = type("Split", (Overflowing, SplitTrainer), {})
    precisions = {"float32": {}, "bfloat16": {"bf16": True}, "float16": {"fp16": True}}
    for name, how in precisions.items() if bench.device == "cuda" else [("float32", {})]:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
            arguments = TrainingArguments(
                folder,
                max_steps=20,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                weight_decay=0.01,
                save_strategy="no",
                report_to=[],
                use_cpu=bench.device == "cpu",
                disable_tqdm=True,
                logging_steps=1,
                **how,
            )
            whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            add_lora(whole, settings_of(config, "llama"), ADAPTER, 0)
            before = {key: weight.detach().clone() for key, weight in weights_of(whole, ADAPTER).items()}
            theirs = whole_class(model=whole, args=arguments, train_dataset=data)
            theirs.train()
            sessions = {"session_tokens": 64, "kv_budget_bytes": 64 << 20}
            with TrunkServer(folder, port=0, device=bench.device, sessions=sessions) as server:
                split = AutoSplitModelForCausalLM.from_pretrained(
                    folder, trunk=server.address, device=bench.device, lora=config
                )
                ours = split_class(model=split, args=arguments, train_dataset=data)
                ours.train()
                after, run = split.adapter_weights(), split.trunk.run
                split.close()
        expected = {key: weight.detach().cpu() for key, weight in weights_of(whole, ADAPTER).items()}
        moved = sum(float((expected[key] - before[key]).square().sum()) for key in before)
        apart = sum(float((expected[key] - after[key]).square().sum()) for key in before)
        told = [[e["loss"] for e in each.state.log_history if "loss" in e] for each in (ours, theirs)]
        loss = max(abs(a - b) / abs(b) for a, b in zip(*told, strict=True))
        skipped = run.step - run.version
        bench.note(f"parity {name}", update=(apart / moved) ** 0.5, loss=loss, skipped=float(skipped))


# ---------------------------------------------------------------- crossing


def crossing(bench: Bench) -> None:
    """Milliseconds for one activation, one way: half of there and back."""
    size = bench.rows * bench.tokens * bench.shape["hidden_size"] * bench.dtype.itemsize
    bench.note("crossing socket", megabytes=size / 1e6, ms=socket_ms(size, 10) / 2)
    host = torch.empty(size, dtype=torch.uint8)
    if bench.device == "cuda":
        there, pinned = torch.empty(size, dtype=torch.uint8, device="cuda"), host.pin_memory()
        for name, work in (
            ("to host, pageable", lambda: host.copy_(there)),
            ("to host, pinned", lambda: pinned.copy_(there)),
            ("to device, pageable", lambda: there.copy_(host)),
            ("to device, pinned", lambda: there.copy_(pinned)),
            ("new host tensor", there.cpu),
        ):
            bench.note(f"copy {name}", ms=median_ms(bench, work, 10))
    import xxhash

    data = bytes(size)
    bench.note("checksum", ms=median_ms(bench, lambda: xxhash.xxh3_64_intdigest(data), 10))
    bench.note("copy in memory", ms=median_ms(bench, lambda: bytearray(data), 10))


def socket_ms(size: int, times: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo() -> None:
            connection, _ = listener.accept()
            with connection:
                buffer = bytearray(size)
                for _ in range(times):
                    receive(connection, buffer)
                    connection.sendall(buffer)

        thread = threading.Thread(target=echo, daemon=True)
        thread.start()
        with socket.create_connection(listener.getsockname()) as connection:
            data, buffer, taken = bytes(size), bytearray(size), []
            for _ in range(times):
                started = time.perf_counter()
                connection.sendall(data)
                receive(connection, buffer)
                taken.append((time.perf_counter() - started) * 1e3)
        thread.join(WAIT_S)
    return statistics.median(taken)


def receive(connection: socket.socket, buffer: bytearray) -> None:
    view, got = memoryview(buffer), 0
    while got < len(buffer):
        got += connection.recv_into(view[got:])


def median_ms(bench: Bench, work: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        bench.synchronize()
        started = time.perf_counter()
        work()
        bench.synchronize()
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken)


# ---------------------------------------------------------------- step

SERVE = """
import sys
sys.path.insert(0, sys.argv[3])
from splitlearn import TrunkServer
sessions = {"session_tokens": 64, "kv_budget_bytes": 64 << 20}
runs = {"tape_budget_bytes": 60 << 30}
with TrunkServer(
    sys.argv[1], port=0, device=sys.argv[2], sessions=sessions, runs=runs, compile=sys.argv[4]
) as server:
    print(server.address, flush=True)
    sys.stdin.read()
"""


class Stopwatch:
    """Milliseconds of wrapped calls, a list a name."""

    def __init__(self, bench: Bench) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self._bench = bench

    def on(self, owner: Any, attribute: str, name: str) -> None:
        timed = getattr(owner, attribute)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._bench.synchronize()
            started = time.perf_counter()
            try:
                return timed(*args, **kwargs)
            finally:
                self._bench.synchronize()
                self.times[name].append((time.perf_counter() - started) * 1e3)

        setattr(owner, attribute, wrapper)

    def median(self, name: str) -> float:
        return statistics.median(self.times[name][-4:])


def whole_step(bench: Bench, folder: str, compiled: bool = False) -> None:
    from splitlearn.model.lora import ADAPTER, add_lora, settings_of

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=bench.dtype).to(bench.device)
    add_lora(model, settings_of(bench.lora(), "llama"), ADAPTER, 0)
    optimizer = adamw(model)
    ids = bench.ids().to(bench.device)
    forward = torch.compile(model.train()) if compiled else model.train()

    def step() -> None:
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    bench.free()
    times = timed_steps(bench, step)
    name = "step whole, compiled" if compiled else "step whole"
    bench.note(name, ms=statistics.median(times), peak_gib=bench.peak_gib())


def split_step(bench: Bench, folder: str, how: str = "eager") -> None:
    from splitlearn import AutoSplitModelForCausalLM
    from splitlearn.client import grpc_transport
    from splitlearn.client.run import ClientRun
    from splitlearn.client.training import clip_grad_norm

    mode = "max" if how == "compile" else "off"
    command = [sys.executable, "-c", SERVE, folder, bench.device, str(SOURCES), mode]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().strip()
        model = AutoSplitModelForCausalLM.from_pretrained(
            folder, trunk=address, device=bench.device, lora=bench.lora(), train_s=WAIT_S
        )
        optimizer = adamw(model.train())
        ids = bench.ids().to(bench.device)
        watch, trunk_ms = Stopwatch(bench), defaultdict(list)
        answered = ClientRun._ask

        def ask(run: Any, message: Any) -> Any:
            answer = answered(run, message)
            trunk_ms[message.key.phase.name.lower()].append(answer.timings.device_us / 1e3)
            trunk_ms["copied"].append(answer.timings.copied_us / 1e3)
            return answer

        ClientRun._ask = ask
        watch.on(ClientRun, "forward", "there and back, forward")
        watch.on(ClientRun, "backward", "there and back, backward")
        watch.on(grpc_transport, "run_step_to_proto", "client encodes")
        watch.on(grpc_transport, "answer_from_proto", "client decodes")

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            clip_grad_norm(model, 1.0)
            model.trunk.step()
            optimizer.step()
            optimizer.zero_grad()

        bench.free()
        times = timed_steps(bench, step)
        parts = {name: watch.median(name) for name in watch.times}
        parts |= {f"trunk {name}": statistics.median(each[-4:]) for name, each in trunk_ms.items()}
        whole = bench.found.get("step whole", {}).get("ms", float("nan"))
        ms = statistics.median(times)
        bench.note(f"step split, {how}", ms=ms, over_whole=ms / whole, peak_gib=bench.peak_gib(), **parts)
        model.close()
        ClientRun._ask = answered
    finally:
        server.stdin.close()
        server.wait(60)


def adamw(model: Any) -> torch.optim.Optimizer:
    trained = [each for each in model.parameters() if each.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, fused=True)


def timed_steps(bench: Bench, step: Callable[[], None]) -> list[float]:
    times = []
    for number in range(bench.warm_up + bench.steps):
        bench.synchronize()
        started = time.perf_counter()
        step()
        bench.synchronize()
        if number >= bench.warm_up:
            times.append((time.perf_counter() - started) * 1e3)
    return times


# ---------------------------------------------------------------- trunk


def trunk(bench: Bench, folder: str) -> None:
    for name, attention, dtype, every, compiled in (
        ("SDPA", "sdpa", bench.dtype, 0, False),
        ("eager", "eager", bench.dtype, 0, False),
        ("SDPA, every layer recomputed", "sdpa", bench.dtype, 1, False),
        ("SDPA, every second layer recomputed", "sdpa", bench.dtype, 2, False),
        ("SDPA, compiled", "sdpa", bench.dtype, 0, True),
        ("SDPA, float32", "sdpa", torch.float32, 0, False),
    ):
        bench.free()
        try:
            ms, peak = trunk_ms(bench, folder, attention, dtype, every, compiled)
            bench.note(f"trunk {name}", ms=ms, peak_gib=peak)
        except torch.OutOfMemoryError as error:
            bench.note(f"trunk {name}", failed=str(error).splitlines()[0])


def trunk_ms(
    bench: Bench, folder: str, attention: str, dtype: torch.dtype, every: int, compiled: bool
) -> tuple[float, float]:
    """Forward, backward and optimizer step of the trunk on the engine's thread; and its peak of memory."""
    from splitlearn.config import BatchingConfig, RunConfig, SessionConfig
    from splitlearn.engine.engine import Engine
    from splitlearn.model.checkpoint import Checkpoint
    from splitlearn.model.plan import SplitPlan
    from splitlearn.model.weights import load_trunk
    from splitlearn.vocabulary import LoraSettings, Phase, RunSettings, StepKey, TapeSettings
    from splitlearn.wire.messages import OpenRun, OptimizerStep, RunStepMessage

    checkpoint = Checkpoint.open(folder)
    segment = load_trunk(
        checkpoint,
        SplitPlan.for_config(checkpoint.config),
        dtype=dtype,
        device=bench.device,
        attention=attention,
    )
    sessions = SessionConfig(session_tokens=64, kv_budget_bytes=64 << 20)
    runs = RunConfig(tape_budget_bytes=70 << 30)
    engine = Engine(segment, BatchingConfig(), sessions, runs, compile="max" if compiled else "off")
    engine.start()
    lora = LoraSettings(r=16, alpha=32, target_modules=tuple(ATTENTION))
    settings = RunSettings(lora=lora, tape=TapeSettings(checkpoint_every=every))
    client = b"c" * 16
    run = engine.runs.open(client, OpenRun("run", settings)).result(WAIT_S)
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(bench.rows, bench.tokens, bench.shape["hidden_size"], generator=generator)
    state = state.to(bench.device, dtype)
    device_ms: list[float] = []

    def ask(step: int, phase: Phase, **what: Any) -> float:
        key = StepKey(run=run.number, incarnation=run.incarnation, step=step, phase=phase)
        answer = engine.submit(client, RunStepMessage(key, **what)).result(WAIT_S)
        if answer.error is not None:
            raise answer.error
        return answer.timings.device_us / 1e3

    for step in range(1, bench.warm_up + bench.steps + 1):
        ms = ask(step, Phase.FORWARD, tensor_BTD=state, seed=1)
        if step == 2:
            bench.free()
        ms += ask(step, Phase.BACKWARD, tensor_BTD=state)
        ms += ask(step, Phase.OPTIMIZER_STEP, optimizer=OptimizerStep(1.0, 1e-4))
        device_ms.append(ms)
    peak = bench.peak_gib()
    engine.stop()
    return statistics.median(device_ms[bench.warm_up :]), peak


# ---------------------------------------------------------------- all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="try the script with tiny shapes")
    parser.add_argument(
        "--only", nargs="+", default=["gradients", "parity", "crossing", "step", "compile", "trunk"]
    )
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    given = parser.parse_args()
    bench = Bench(given.cpu)
    bench.note(
        "machine",
        device="cpu" if given.cpu else torch.cuda.get_device_name(),
        torch=torch.__version__,
    )
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(bench.device):
            torch.set_default_dtype(bench.dtype)
            LlamaForCausalLM(LlamaConfig(**bench.shape)).save_pretrained(folder)
            torch.set_default_dtype(torch.float32)
        bench.free()
        if "gradients" in given.only:
            gradients(bench)
        if "parity" in given.only:
            parity(bench)
        if "crossing" in given.only:
            crossing(bench)
        if "step" in given.only:
            whole_step(bench, folder)
            bench.free()
            split_step(bench, folder)
            if "compile" in given.only:
                bench.free()
                split_step(bench, folder, "compile")
        if "trunk" in given.only:
            trunk(bench, folder)
    if given.output:
        given.output.write_text(json.dumps(bench.found, indent=1) + "\n")
    print("\n| what | ms | |\n| --- | --- | --- |")
    for name, figures in bench.found.items():
        rest = ", ".join(f"{k} {v:.3g}" for k, v in figures.items() if k != "ms" and isinstance(v, float))
        print(f"| {name} | {figures.get('ms', float('nan')):.1f} | {rest} |")


if __name__ == "__main__":
    main()
