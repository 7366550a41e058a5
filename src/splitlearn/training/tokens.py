"""An example's tokens, and which of them are learned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from jinja2 import TemplateError

from splitlearn.errors import DataError, SettingError
from splitlearn.training.lines import Chat, Completion, Document, Example

IGNORED = -100
"""The label of a token that is not learned, as the library's losses know it."""
MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
LEARNED_FROM = "give prompt and completion instead, as the model is to see them"


class Tokenized(TypedDict):
    """Two lists of one length. A label is its token's id, or IGNORED; the first always is IGNORED.

    Nothing comes before the first token, so nothing can predict it: a count of labels is a count
    of terms of the loss.
    """

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Tokenization:
    """What became of the examples."""

    examples: list[Tokenized]
    truncated: int
    """Examples that were longer and are learned up to `max_tokens`."""
    dropped: int
    """Examples (of a plain file: blocks) that are left out, because nothing of them would be learned."""


def tokenize(examples: Sequence[Example], tokenizer: Any, max_tokens: int) -> Tokenization:
    """Tokens and labels, none longer than `max_tokens`, in the examples' order.

    - `Text`: all of it is learned.
    - `Completion`: the prompt is not. The prompt's tokens are those that it has alone, as generation
      will see it.
    - `Chat`, in the tokenizer's chat template: every turn that the template marks with
      `{% generation %}`; if it marks none, the last message alone, from where the template asks for it.
    - `Document`: all of it, in blocks of `max_tokens`; the last one is shorter.

    The tokenizer's beginning is put before what is not a chat, and its end token after every
    answer that has none; both count. What is longer is cut at its end, and so loses its end token.

    Args:
        tokenizer: the model's, of the library.
        max_tokens: 2 or more.

    Raises:
        DataError: a chat has no template, or the template refuses it or cannot be learned from.
        SettingError: `max_tokens` is too small.
    """
    if max_tokens < 2:
        raise SettingError(f"max_tokens = {max_tokens}: an example needs 2 tokens, one to predict from")
    kept: list[Tokenized] = []
    truncated = dropped = 0
    for example in examples:
        whole = _tokenized(example, tokenizer)
        pieces = _pieces(whole, max_tokens) if isinstance(example, Document) else [_cut(whole, max_tokens)]
        learnable = [piece for piece in pieces if learned(piece)]
        kept += learnable
        dropped += len(pieces) - len(learnable)
        if not isinstance(example, Document) and len(whole["input_ids"]) > max_tokens:
            truncated += len(learnable)
    return Tokenization(kept, truncated, dropped)


def learned(example: Tokenized) -> int:
    """How many of its tokens are learned: the terms of its loss."""
    return sum(label != IGNORED for label in example["labels"])


def _pieces(whole: Tokenized, max_tokens: int) -> list[Tokenized]:
    return [_cut(whole, max_tokens, start) for start in range(0, len(whole["input_ids"]), max_tokens)]


def _cut(whole: Tokenized, max_tokens: int, start: int = 0) -> Tokenized:
    ids = whole["input_ids"][start : start + max_tokens]
    labels = whole["labels"][start : start + max_tokens]
    return {"input_ids": ids, "labels": [IGNORED, *labels[1:]]}


def _tokenized(example: Example, tokenizer: Any) -> Tokenized:
    if isinstance(example, Chat):
        return _chat(example, tokenizer)
    if isinstance(example, Completion):
        ids, start = _joined(tokenizer, example.prompt, example.completion)
    else:
        ids, start = _ids(tokenizer, example.text), 0
    return _learned_from(_ended(ids, tokenizer, len(ids) - 1), start)


def _learned_from(ids: list[int], start: int) -> Tokenized:
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}


def _chat(chat: Chat, tokenizer: Any) -> Tokenized:
    try:
        template = tokenizer.get_chat_template()
    except (ValueError, AttributeError):
        raise DataError(
            f"{chat.where}: messages need a chat template and this model's tokenizer has none: "
            f"take the instruct model, or {LEARNED_FROM}"
        ) from None
    try:
        if MARKS_ANSWERS.search(template) and tokenizer.is_fast:
            return _marked_answers(chat, tokenizer)
        return _last_answer(chat, tokenizer)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{chat.where}: the tokenizer's chat template refuses these messages ({error}): mend them, "
            f"or {LEARNED_FROM}"
        ) from None


def _marked_answers(chat: Chat, tokenizer: Any) -> Tokenized:
    encoded = tokenizer.apply_chat_template(
        chat.messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    ids, is_answer = list(encoded["input_ids"]), [bool(each) for each in encoded["assistant_masks"]]
    if not any(is_answer):
        raise DataError(
            f"{chat.where}: the tokenizer's chat template marks no token of these messages as an answer: "
            f"mend the template, or {LEARNED_FROM}"
        )
    last_start = max(n for n, marked in enumerate(is_answer) if marked and not (n and is_answer[n - 1]))
    ids = _ended(ids, tokenizer, last_start)
    is_answer += [True] * (len(ids) - len(is_answer))
    labels = [token if marked else IGNORED for token, marked in zip(ids, is_answer, strict=True)]
    return {"input_ids": ids, "labels": labels}


def _last_answer(chat: Chat, tokenizer: Any) -> Tokenized:
    asked: str = tokenizer.apply_chat_template(chat.messages[:-1], tokenize=False, add_generation_prompt=True)
    whole: str = tokenizer.apply_chat_template(chat.messages, tokenize=False)
    if not whole.startswith(asked):
        raise DataError(
            f"{chat.where}: the tokenizer's chat template writes these messages otherwise once they are "
            f"answered, so that the answer's beginning cannot be told: {LEARNED_FROM}"
        )
    ids, start = _joined(tokenizer, asked, whole[len(asked) :], is_written=True)
    return _learned_from(_ended(ids, tokenizer, start), start)


def _joined(tokenizer: Any, prompt: str, completion: str, is_written: bool = False) -> tuple[list[int], int]:
    """Both texts' tokens, and where the completion's begin; `is_written`: special tokens stand in them."""
    before = _ids(tokenizer, prompt, is_written)
    if before and before[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        before.pop()
    ids = _ids(tokenizer, prompt + completion, is_written)
    if ids[: len(before)] != before:
        # A token would span the two texts; generation, which starts from the prompt's, cannot make it.
        ids = before + _ids(tokenizer, completion, True)
    return ids, len(before)


def _ids(tokenizer: Any, text: str, is_written: bool = False) -> list[int]:
    # Not verbose: it would warn of texts that are cut here anyway.
    return list(tokenizer(text, add_special_tokens=not is_written, verbose=False)["input_ids"])


def _ended(ids: list[int], tokenizer: Any, answer_start: int) -> list[int]:
    """With the end token, unless the last answer has it, or the tokenizer has none."""
    end = tokenizer.eos_token_id
    if end is None or end in ids[max(answer_start, 0) :]:
        return ids
    return [*ids, end]
