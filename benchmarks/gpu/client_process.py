"""A client of a benchmark in a process of its own: it generates, trains, or sends one long prompt."""

from __future__ import annotations

import gc
import secrets
import sys
import time
from typing import Any

import structlog
import torch
from peft import LoraConfig
from torch import Tensor
from transformers.utils import logging

from splitlearn import AutoSplitModelForCausalLM
from splitlearn.bench.worker import do_as_told
from splitlearn.client.calls import describe
from splitlearn.client.grpc_transport import GrpcTransport
from splitlearn.client.training import clip_grad_norm
from splitlearn.config import ClientConfig
from splitlearn.vocabulary import StepKey
from splitlearn.wire.dtypes import dtype_named
from splitlearn.wire.frames import FrameFormat
from splitlearn.wire.handshake import ModelIdentity
from splitlearn.wire.messages import CloseMessage, OpenSession, StepMessage

WARM_UP_STEPS = 2
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


class ClientProcess:
    def __init__(self) -> None:
        logging.disable_progress_bar()
        self._model: Any = None
        self._optimizer: Any = None
        self._device = "cpu"

    def load(self, model: str, trunk: str, device: str, **settings: Any) -> None:
        """`lora_r` makes it a model to be trained; the other settings are the client's."""
        rank = settings.pop("lora_r", 0)
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ATTENTION) if rank else None
        self._device = device
        self._model = AutoSplitModelForCausalLM.from_pretrained(
            model, trunk=trunk, device=device, lora=lora, **settings
        )
        if lora:
            trained = [each for each in self._model.parameters() if each.requires_grad]
            self._optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def unload(self) -> None:
        if self._optimizer is not None:
            self._model.trunk.close_run()
        self._model.close()
        self._model = self._optimizer = None
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def generate(
        self, rows: int, prompt_tokens: int, new_tokens: int, use_cache: bool = True
    ) -> dict[str, Any]:
        """When it began and ended, by the machine's clock, and the trunk's last step."""
        ids_BT = self._ids(rows, prompt_tokens)
        self._synchronize()
        began = time.perf_counter()
        text_BT = self._model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
            eos_token_id=None,
        )
        self._synchronize()
        ended = time.perf_counter()
        return {
            "began": began,
            "ended": ended,
            "tokens": rows * (text_BT.shape[1] - prompt_tokens),
            "trunk_ms": self._model.trunk.last_timings.device_us / 1e3,
        }

    def train(self, rows: int, tokens: int, seconds: float) -> dict[str, float]:
        """Steps behind the first few, when they began and ended."""
        ids_BT = self._ids(rows, tokens)
        for _ in range(WARM_UP_STEPS):
            self._step(ids_BT)
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            self._step(ids_BT)
            steps += 1
        return {"began": began, "ended": time.perf_counter(), "steps": steps}

    def prefill(self, address: str, tokens: int, times: int, pause_s: float) -> list[dict[str, float]]:
        """Prompts of so many tokens after one that is not counted: kept activations, no model here."""
        facts = describe(address, ClientConfig().connect_s)
        layers = facts.bottom_layers, facts.trunk_layers, facts.top_layers
        identity = ModelIdentity(facts.config_hash, facts.weights_hash, *layers)
        transport = GrpcTransport(address, identity, ClientConfig(), FrameFormat())
        draw = torch.Generator().manual_seed(0)
        state_BTD = torch.randn(1, tokens, facts.hidden_size, generator=draw)
        state_BTD = state_BTD.to(dtype_named(facts.precision.weights))
        told = []
        for _ in range(1 + times):
            key = StepKey(session=secrets.randbits(32) | 1, step=1)
            message = StepMessage(key, state_BTD, open=OpenSession(), deadline_s=ClientConfig().prefill_s)
            began = time.perf_counter()
            answer = transport.step(message)
            ended = time.perf_counter()
            told.append({"began": began, "ended": ended, "device_ms": answer.timings.device_us / 1e3})
            transport.close_session(CloseMessage(key.session))
            time.sleep(pause_s)
        transport.close()
        return told[1:]

    def _step(self, ids_BT: Tensor) -> None:
        self._model.train()
        self._model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        clip_grad_norm(self._model, 1.0)
        self._model.trunk.step()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._synchronize()

    def _ids(self, rows: int, tokens: int) -> Tensor:
        """Arbitrary tokens: what a text says does not change what it costs."""
        draw = torch.Generator().manual_seed(0)
        vocabulary = self._model.config.vocab_size
        return torch.randint(3, vocabulary, (rows, tokens), generator=draw).to(self._device)

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    # Lines on stdout are answers.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    do_as_told(ClientProcess())
