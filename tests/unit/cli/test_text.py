import pytest
import torch

from splitlearn.cli.text import chat_inputs, load_tokenizer, prompt_inputs
from splitlearn.errors import CheckpointError, SettingError


class Words:
    """A tokenizer of words that also gives what `generate` does not take."""

    chat_template = None

    def __call__(self, text, **how):
        ids = torch.tensor([[len(word) for word in text.split()]], dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0}


def test_only_what_generate_takes():
    assert prompt_inputs(Words(), "two words").keys() == {"input_ids", "attention_mask"}


def test_an_empty_prompt_is_refused():
    with pytest.raises(SettingError, match="empty"):
        prompt_inputs(Words(), "")


def test_no_chat_without_a_template():
    with pytest.raises(SettingError, match="chat template"):
        chat_inputs(Words(), [{"role": "user", "content": "hello"}])


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(str(tmp_path))
