"""One process that writes texts: with a split model over the wire, or with the whole model."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from splitlearn.bench.latencies import Latencies
from splitlearn.bench.worker import do_as_told
from splitlearn.client.split_model import AutoSplitModelForCausalLM
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.weights import resolve_dtype

WARM_UP_TOKENS = 3


class TextWorker:
    """Loads one model, then generates as often as it is told."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        logging.disable_progress_bar()
        self._model: Any = None

    def load_split(self, model: str, trunk: str, dtype: str, codec: str) -> None:
        self._model = AutoSplitModelForCausalLM.from_pretrained(model, trunk=trunk, dtype=dtype, codec=codec)
        self._warm_up()

    def load_whole(self, model: str, dtype: str) -> None:
        kind = resolve_dtype(dtype, Checkpoint.open(model))
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=kind).eval()
        self._warm_up()

    def generate(self, seed: int, rows: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """When it began and ended, by the machine's clock, and how long each token behind the first took."""
        clock = TokenClock()
        prompt_BT = self._prompt(seed, rows, prompt_tokens)
        # The library streams one row only.
        how = {"streamer": clock} if rows == 1 else {}
        began = time.perf_counter()
        made_BT = self._model.generate(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            **how,
        )
        ended = time.perf_counter()
        return {
            "began": began,
            "ended": ended,
            "tokens": rows * (made_BT.shape[1] - prompt_tokens),
            "latencies": Latencies.of(clock.gaps_s).counts,
        }

    def close(self) -> None:
        if hasattr(self._model, "trunk"):
            self._model.close()

    def _warm_up(self) -> None:
        """The first call of all is slower."""
        self.generate(0, 1, WARM_UP_TOKENS, WARM_UP_TOKENS)

    def _prompt(self, seed: int, rows: int, tokens: int) -> Tensor:
        """Arbitrary tokens: what a text says does not change what it costs."""
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(self._model.config.vocab_size, (rows, tokens), generator=draw)


class TokenClock(BaseStreamer):
    """Notes when each token came."""

    def __init__(self) -> None:
        self._came_at: list[float] = []

    def put(self, value: Tensor) -> None:
        self._came_at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""

    @property
    def gaps_s(self) -> list[float]:
        """Between new tokens; the first that is put is the prompt."""
        new = self._came_at[1:]
        return [later - earlier for earlier, later in pairwise(new)]


if __name__ == "__main__":
    do_as_told(TextWorker())
