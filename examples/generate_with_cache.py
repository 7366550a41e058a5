"""The same text with and without the trunk's KV cache: equal tokens, and what each way costs.

    python examples/generate_with_cache.py
    python examples/generate_with_cache.py --model DIR --trunk HOST:PORT --new-tokens 50

The first line takes the bundled model and starts a server in this process. With the cache, each
token's activation crosses the wire once. Without it, every step sends the whole text again, and the
trunk computes all of it again.
"""

import argparse
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer

from splitlearn import AutoSplitModelForCausalLM, TrunkServer
from splitlearn.cli.demo_model import bundled_model

PROMPT = "The cut runs through the middle of the model, so that the text stays with its owner. Only"


@dataclass(frozen=True)
class Measured:
    tokens: list[int]
    seconds: float
    tensor_bytes: int
    message_bytes: int


def measure(model, inputs, new_tokens: int, *, use_cache: bool) -> Measured:
    """Generate greedily; the model's `trunk` counts what crosses the wire."""
    traffic = model.trunk.transport.traffic
    tensors, messages, started = traffic.tensor_bytes, traffic.message_bytes, time.perf_counter()
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, use_cache=use_cache)
    return Measured(
        tokens=ids[0, inputs["input_ids"].shape[1] :].tolist(),
        seconds=time.perf_counter() - started,
        tensor_bytes=traffic.tensor_bytes - tensors,
        message_bytes=traffic.message_bytes - messages,
    )


def print_table(with_cache: Measured, without: Measured) -> None:
    print(f"{'':<16}{'seconds':>10}{'tokens/s':>10}{'tensor bytes':>16}{'message bytes':>16}")
    for name, run in (("with cache", with_cache), ("without cache", without)):
        pace = len(run.tokens) / run.seconds
        print(f"{name:<16}{run.seconds:>10.2f}{pace:>10.1f}{run.tensor_bytes:>16,}{run.message_bytes:>16,}")
    saved = 1 - with_cache.tensor_bytes / without.tensor_bytes
    faster = without.seconds / with_cache.seconds
    print(f"\nThe cache saves {saved:.1%} of the bytes and is {faster:.1f} times as fast.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; the bundled SmolLM2-135M-Instruct by default")
    parser.add_argument("--trunk", help="host:port of a server; one is started in this process by default")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--new-tokens", type=int, default=16)
    asked = parser.parse_args()

    # Client and server take turns: one thread each is fastest on a small machine.
    torch.set_num_threads(1)
    folder = asked.model or bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(asked.prompt, return_tensors="pt", return_token_type_ids=False)

    with nullcontext() if asked.trunk else TrunkServer(folder, port=0) as server:
        address = asked.trunk or server.address
        with closing(AutoSplitModelForCausalLM.from_pretrained(folder, trunk=address)) as model:
            measure(model, inputs, 1, use_cache=True)  # the first call of all is slower
            with_cache = measure(model, inputs, asked.new_tokens, use_cache=True)
            without = measure(model, inputs, asked.new_tokens, use_cache=False)

    prompt_tokens = inputs["input_ids"].shape[1]
    print(f"{prompt_tokens} tokens of prompt, {len(with_cache.tokens)} new ones:\n")
    print(asked.prompt + tokenizer.decode(with_cache.tokens, skip_special_tokens=True) + "\n")
    print_table(with_cache, without)
    if with_cache.tokens != without.tokens:
        print("error: the two texts differ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
