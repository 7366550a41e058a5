"""How many bytes does a text cost on the wire, with the cache on the server and without?

SmolLM2-135M, 100 new tokens after a prompt of 16. Tensor bytes are the activations' alone; message bytes are
those of the serialised steps and answers, both ways; gRPC's and TCP's own framing is not in them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from _common import markdown, serving, write
from _generation import NEW_TOKENS, bundled_model, prompt, tokens_per_s

from splitlearn import AutoSplitModelForCausalLM

PROMPT = 16
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, codec half": {"codec": "half"},
    "bfloat16": {"dtype": "bfloat16"},
    "float32, no cache": {"use_cache": False},
}


def measure(address: str, folder: Any, use_cache: bool = True, **settings: Any) -> dict[str, float]:
    model = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=address, **settings)
    traffic = model.trunk.transport.traffic
    before = replace(traffic)
    tokens_per_s(model, prompt(PROMPT), use_cache=use_cache)
    tensor, message = traffic.tensor_bytes - before.tensor_bytes, traffic.message_bytes - before.message_bytes
    model.close()
    return {
        "tensor_bytes": tensor,
        "message_bytes": message,
        "overhead": (message - tensor) / tensor,
        "tensor_bytes_per_token": tensor / NEW_TOKENS,
    }


def main() -> None:
    torch.set_num_threads(1)
    folder = bundled_model()
    figures = {}
    for name, case in CASES.items():
        with serving(folder, "--dtype", case.get("dtype", "float32")) as server:
            figures[name] = measure(server.address, folder, **case)
    none, cached = figures["float32, no cache"]["tensor_bytes"], figures["float32"]["tensor_bytes"]
    rows = [
        (
            name,
            f"{f['tensor_bytes'] / 1e6:.3f}",
            f"{f['tensor_bytes_per_token']:.0f}",
            f"{100 * f['overhead']:.1f} %",
        )
        for name, f in figures.items()
    ]
    header = ("case", "tensors, MB", "bytes a new token", "overhead of the messages")
    saved = (
        f"\n\nThe cache on the server saves {100 * (1 - cached / none):.1f} % of the bytes (wanted: 97 %)."
    )
    write("wire_bytes", figures | {"saved": 1 - cached / none}, markdown(header, rows) + saved)


if __name__ == "__main__":
    main()
