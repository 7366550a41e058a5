"""A tokenizer whose tokens are characters, so that a test can say which of them are learned."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHARACTERS = sorted(string.ascii_letters + string.digits + string.punctuation + " \n")
VOCABULARY = {name: number for number, name in enumerate([*SPECIAL, *CHARACTERS])}


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[..., Any]:
    """A tokenizer; `begins` and `ends` are the special tokens that it adds by itself."""

    def make(chat_template: str | None = None, begins: bool = True, ends: bool = False, **how: Any) -> Any:
        characters = Tokenizer(models.WordLevel(VOCABULARY, "<unk>"))
        characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        characters.decoder = decoders.Fuse()
        characters.post_processor = processors.TemplateProcessing(
            single=" ".join(["<s>"] * begins + ["$A"] + ["</s>"] * ends),
            special_tokens=[(name, VOCABULARY[name]) for name in ("<s>", "</s>")],
        )
        names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(
            tokenizer_object=characters,
            chat_template=chat_template,
            clean_up_tokenization_spaces=False,
            **(names | how),
        )

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A file of these lines: texts as they are, everything else as JSON."""

    def write(*lines: Any, name: str = "data.jsonl") -> Path:
        file = tmp_path / name
        said = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        file.write_text("\n".join(said), encoding="utf-8")
        return file

    return write
