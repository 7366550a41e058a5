"""`splitlearn chat`: a conversation, whose cache stays on the trunk between its turns."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated, Any

import typer

from splitlearn.cli.options import (
    AcceptLabelLeak,
    Codec,
    MaxNewTokens,
    Model,
    OwnBottomLayers,
    OwnDevice,
    OwnDType,
    OwnTopLayers,
    Seed,
    Temperature,
    TopP,
    Trunk,
)
from splitlearn.errors import SessionLost

GOODBYE = "/exit"


def chat(
    model: Model,
    trunk: Trunk,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Seed = None,
    bottom_layers: OwnBottomLayers = None,
    top_layers: OwnTopLayers = None,
    accept_label_leak: AcceptLabelLeak = False,
    dtype: OwnDType = "auto",
    codec: Codec = "raw",
    device: OwnDevice = "cpu",
) -> None:
    """Talk with a model; `/exit` or Ctrl-D ends it.

    Between turns the cache stays on the trunk: only what is new is sent.
    """
    from splitlearn.cli.generation import sampling
    from splitlearn.cli.text import load_tokenizer
    from splitlearn.client.split_model import AutoSplitModelForCausalLM

    how = sampling(temperature, top_p, seed) | {"max_new_tokens": max_new_tokens}
    tokenizer = load_tokenizer(model)
    client = AutoSplitModelForCausalLM.from_pretrained(
        model,
        trunk=trunk,
        bottom_layers=bottom_layers,
        top_layers=top_layers,
        accept_label_leak=accept_label_leak,
        dtype=dtype,
        device=device,
        codec=codec,
    )
    with closing(client):
        conversation = Conversation(client, tokenizer, system, how)
        while (said := _listen()) is not None:
            conversation.answer(said)


class Conversation:
    """The turns so far, and the cache that holds them; only what is new is sent to the trunk."""

    def __init__(self, client: Any, tokenizer: Any, system: str | None, how: dict[str, Any]) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._how = how
        self._messages = [{"role": "system", "content": system}] if system else []
        self._cache: Any = None
        self._held_ids: list[int] = []

    def answer(self, said: str) -> str:
        """Stream the model's answer to stdout and remember it."""
        self._messages.append({"role": "user", "content": said})
        try:
            text = self._generate()
        except SessionLost:
            # The trunk forgot the conversation (its lease ran out, or it restarted); it is all here.
            self._cache, self._held_ids = None, []
            text = self._generate()
        self._messages.append({"role": "assistant", "content": text})
        return text

    def _generate(self) -> str:
        from splitlearn.cli.generation import generate_text
        from splitlearn.cli.text import chat_inputs

        inputs = chat_inputs(self._tokenizer, self._messages)
        self._forget_what_differs(inputs["input_ids"][0].tolist())
        made = generate_text(
            self._client,
            self._tokenizer,
            inputs,
            show=sys.stdout,
            past_key_values=self._cache,
            **self._how,
        )
        self._cache = made.output.past_key_values
        # The last token was chosen and never run, so the cache does not hold it.
        self._held_ids = made.output.sequences[0, : self._cache.get_seq_length()].tolist()
        return made.text

    def _forget_what_differs(self, ids: list[int]) -> None:
        """Where the template writes a turn in other tokens than the model did, the cache is cut back."""
        surplus = len(self._held_ids) - common_length(self._held_ids, ids[:-1])
        if not surplus:
            return
        try:
            self._cache.crop(-surplus)
        except RuntimeError:
            # A sliding window has passed over what would be needed again.
            self._cache = None


def common_length(first: list[int], second: list[int]) -> int:
    """How many tokens two texts share from their start."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _listen() -> str | None:
    """What the user says next; None at the end. An empty line says nothing."""
    said = ""
    while not said:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
    return None if said == GOODBYE else said
