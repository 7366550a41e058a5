"""A whole model, and the same model split over a real gRPC server: what tests compare."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from splitlearn.client.split_model import AutoSplitModelForCausalLM
from splitlearn.engine.engine import Engine
from splitlearn.model.skeleton import decoder_of, layers_of
from splitlearn.server.trunk_server import TrunkServer
from splitlearn.testing.tiny import tiny_model, tiny_whole

LIVELY = 20.0
CLEAR_ROUTES = {"mixtral": 4, "qwen2_moe": 4, "qwen3_moe": 5, "gpt_oss": 5, "deepseek_v3": 5}
"""Seeds whose second and third expert differ by 7e-5 or more at each token of the parity checks' texts.

With seed 0 two of qwen3_moe's experts are 4e-8 apart: the last bit of a sum chooses, so one prompt in
pieces and whole may rightly take another expert.
"""
SESSION_TOKENS = 96
MEET_S = 30.0


@dataclass(frozen=True, slots=True)
class Pair:
    """Both generate to the last token asked for: neither stops at an end token."""

    whole: PreTrainedModel
    split: PreTrainedModel
    server: TrunkServer

    @property
    def engine(self) -> Engine:
        return self.server.engine


@contextmanager
def served_pair(
    folder: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    client: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Pair]:
    """The model in this folder, whole and split 2/n/2, all on one device.

    `settings` are the server's, `client` are the client's.
    """
    how: dict[str, Any] = {"port": 0, "sessions": {"session_tokens": SESSION_TOKENS}}
    with TrunkServer(folder, dtype=dtype, device=device, **(how | settings)) as server:
        whole = tiny_whole(folder, dtype=dtype).to(device)
        split = AutoSplitModelForCausalLM.from_pretrained(
            folder, trunk=server.address, dtype=dtype, device=device, **(client or {})
        )
        for model in (whole, split):
            model.generation_config.eos_token_id = None
        try:
            yield Pair(whole, split, server)
        finally:
            split.close()


def lively_model(family: str, folder: str | Path, seed: int | None = None, **overrides: Any) -> Path:
    """A tiny model whose tokens depend on all those before them.

    With the library's small random weights most families repeat one token, whatever their layers do.
    Without a seed it is one by which no token stands between two experts.
    """
    seed = CLEAR_ROUTES.get(family, 0) if seed is None else seed
    whole = tiny_whole(tiny_model(family, folder, seed, **overrides))
    with torch.no_grad():
        for weight in layers_of(decoder_of(whole)).parameters():
            if weight.ndim > 1:
                weight.mul_(LIVELY)
    whole.save_pretrained(folder)
    return Path(folder)


@contextmanager
def meeting(engine: Engine, sessions: int) -> Iterator[None]:
    """Within it so many sessions wait for each other at every step, so that their steps surely meet."""
    met = False

    def wait_for_company() -> None:
        nonlocal met
        until = time.monotonic() + MEET_S
        while time.monotonic() < until:
            met = met or engine.open_sessions >= sessions
            if len(engine._ready) >= (engine.open_sessions if met else sessions):
                break
            engine._queue.wait(until - time.monotonic())
            engine._accept()

    vars(engine)["_wait_for_company"] = wait_for_company
    try:
        yield
    finally:
        del vars(engine)["_wait_for_company"]
