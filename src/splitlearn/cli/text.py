"""Text in: the model's own tokenizer, and a prompt as it is or in the model's chat template."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from splitlearn.errors import CheckpointError, SettingError

Message = dict[str, str]


def load_tokenizer(model: str) -> Any:
    """Raises CheckpointError where the folder or hub id has none."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{model} has no tokenizer that can be loaded ({reason}): save the model's own beside it"
        ) from None


def prompt_inputs(tokenizer: Any, prompt: str, *, chat: bool = False) -> dict[str, Any]:
    """What `generate` takes: the prompt's tokens and their mask.

    Raises:
        SettingError: the prompt is empty, or there is no chat template to put it in.
    """
    if chat:
        return chat_inputs(tokenizer, [{"role": "user", "content": prompt}])
    inputs = _for_generate(tokenizer(prompt, return_tensors="pt"))
    if not inputs["input_ids"].numel():
        raise SettingError("the prompt is empty: give at least one word")
    return inputs


def chat_inputs(tokenizer: Any, messages: list[Message]) -> dict[str, Any]:
    """The conversation so far, up to where the model's next answer begins.

    Raises:
        SettingError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise SettingError(
            "this model's tokenizer has no chat template: it continues text, "
            "so use `splitlearn generate` without --chat"
        )
    return _for_generate(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    )


def _for_generate(encoded: Any) -> dict[str, Any]:
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
