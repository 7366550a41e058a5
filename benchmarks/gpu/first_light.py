"""Does a trunk on a GPU give the whole model's results there, and what does the split cost a token?

Run on a machine with one CUDA GPU: `python benchmarks/gpu/first_light.py` (`--cpu` tries the script with
tiny shapes). First correctness, tiny models in float32; then speed, random weights of a 1B shape in bfloat16,
whole and split (2/12/2), client and server as two processes on that GPU. Nothing is compiled yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

FAMILIES = ("llama", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2", "qwen2_moe", "bloom")
SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
TINY_SHAPE = SHAPE | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
TINY_SHAPE |= {"num_key_value_heads": 2, "num_hidden_layers": 6}
ROWS, NEW_TOKENS, PROMPT, PAIRS = (1, 8), 100, 128, 3


def generated(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    how = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **how)


def correctness(device: str) -> list[dict[str, Any]]:
    from splitlearn import AutoSplitModelForCausalLM, TrunkServer
    from splitlearn.testing import tiny_model

    rows = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = tiny_model(family, temporary)
            whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
            ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
            sessions = {"session_tokens": 64, "kv_budget_bytes": 64 << 20}
            with TrunkServer(folder, port=0, device=device, sessions=sessions) as server:
                split = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=server.address, device=device)
                with torch.no_grad():
                    a, b = whole(ids).logits, split(ids).logits
                same = torch.equal(generated(whole, ids, 20), generated(split, ids, 20))
                split.close()
        rows.append({"family": family, "relative": ((a - b).norm() / a.norm()).item(), "same_text": same})
        print(json.dumps(rows[-1]), flush=True)
    return rows


SERVE = """
import sys
sys.path.insert(0, sys.argv[3])
from splitlearn import TrunkServer
with TrunkServer(sys.argv[1], port=0, device=sys.argv[2], sessions={"session_tokens": 512}) as server:
    print(server.address, flush=True)
    sys.stdin.read()
"""


def speed(device: str, shape: dict[str, int]) -> list[dict[str, Any]]:
    from splitlearn import AutoSplitModelForCausalLM

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(device):
            torch.set_default_dtype(torch.bfloat16)
            LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
            torch.set_default_dtype(torch.float32)
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
        command = [
            sys.executable,
            "-c",
            SERVE,
            folder,
            device,
            str(Path(__file__).resolve().parents[2] / "src"),
        ]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            address = server.stdout.readline().strip()
            split = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=address, device=device)
            rows = [compare(whole, split, count, device, shape["vocab_size"]) for count in ROWS]
            split.close()
        finally:
            server.stdin.close()
            server.wait(60)
    return rows


def compare(whole: Any, split: Any, count: int, device: str, vocabulary: int) -> dict[str, Any]:
    ids = torch.randint(3, vocabulary, (count, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    speeds: dict[str, list[float]] = {"whole": [], "split": []}
    for turn in range(PAIRS + 1):
        for name, model in (("whole", whole), ("split", split)):
            started = time.perf_counter()
            generated(model, ids, NEW_TOKENS)
            if turn:
                speeds[name].append(count * NEW_TOKENS / (time.perf_counter() - started))
    row = {"rows": count} | {name: round(statistics.median(each), 1) for name, each in speeds.items()}
    row["ratio"] = round(
        statistics.median(a / b for a, b in zip(speeds["split"], speeds["whole"], strict=True)), 3
    )
    row["trunk_step_ms"] = split.trunk.last_timings.device_us / 1000
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="try the script with tiny shapes")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    given = parser.parse_args()
    device = "cpu" if given.cpu else "cuda"
    figures = {
        "device": "cpu" if given.cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "correctness": correctness(device),
        "speed": speed(device, TINY_SHAPE if given.cpu else SHAPE),
    }
    if given.output:
        given.output.write_text(json.dumps(figures, indent=2) + "\n")
    print("\n| rows | whole, tokens/s | split, tokens/s | ratio | trunk step, ms |")
    print("| --- | --- | --- | --- | --- |")
    for row in figures["speed"]:
        print(
            f"| {row['rows']} | {row['whole']} | {row['split']} | {row['ratio']} | {row['trunk_step_ms']} |"
        )


if __name__ == "__main__":
    main()
