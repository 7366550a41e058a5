"""`splitlearn verify`: the split model beside the whole one, on the user's own model."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated, Any

import typer

from splitlearn.cli.ending import FAILED
from splitlearn.cli.options import (
    AcceptLabelLeak,
    Codec,
    Model,
    OwnBottomLayers,
    OwnDType,
    OwnTopLayers,
    Trunk,
)
from splitlearn.config import ClientConfig

PROMPT = "A model is cut in three: the ends stay with the owner of the text, and the middle runs elsewhere."


def verify(
    model: Model,
    trunk: Trunk,
    prompt: Annotated[str, typer.Option(help="The text that both models are given.")] = PROMPT,
    bottom_layers: OwnBottomLayers = None,
    top_layers: OwnTopLayers = None,
    accept_label_leak: AcceptLabelLeak = False,
    dtype: OwnDType = "auto",
    codec: Codec = "raw",
) -> None:
    """Show that split and whole give the same, on your own model.

    Logits, texts, and the gradients of one training step. Loads the whole model here too.
    """
    from splitlearn.cli.checks import print_checks
    from splitlearn.cli.gradient_parity import LORA, SEED, check_gradients
    from splitlearn.cli.parity import Pair, attempt, parity_checks, tolerance_of
    from splitlearn.cli.text import load_tokenizer, prompt_inputs
    from splitlearn.cli.whole_model import load_whole
    from splitlearn.client.calls import delete_run, describe
    from splitlearn.client.split_model import AutoSplitModelForCausalLM

    inputs = prompt_inputs(load_tokenizer(model), prompt)

    def load(**lora: Any) -> Any:
        return AutoSplitModelForCausalLM.from_pretrained(
            model,
            trunk=trunk,
            bottom_layers=bottom_layers,
            top_layers=top_layers,
            accept_label_leak=accept_label_leak,
            dtype=dtype,
            codec=codec,
            **lora,
        )

    with closing(load()) as split:
        whole = load_whole(model, dtype)
        facts = describe(trunk, ClientConfig().connect_s)
        weights = (facts.precision.weights, str(split.dtype).removeprefix("torch."))
        tolerance = tolerance_of({*weights, "bfloat16" if codec == "half" else "auto"}, facts.device)
        all_right = print_checks(parity_checks(Pair(split, whole, tolerance), inputs))
    with closing(load(lora=LORA, seed=SEED)) as split:
        trained = attempt("gradients", lambda: check_gradients(split, whole, inputs, tolerance))
        if split.trunk.is_training:
            delete_run(trunk, split.trunk.run.name, ClientConfig().connect_s)
    if not (print_checks([trained]) and all_right):
        raise typer.Exit(FAILED)
