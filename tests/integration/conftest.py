"""A tiny model with a tiny tokenizer, a trunk server in a process of its own, and the real command."""

import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from splitlearn.cli.main import app
from splitlearn.cli.trunk_process import TrunkProcess
from splitlearn.testing.pair import lively_model

DEADLINE_S = 180.0
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHARACTERS = sorted(string.ascii_letters + string.digits + string.punctuation + " \n")
VOCABULARY = [*SPECIAL, *CHARACTERS]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

Run = Callable[..., subprocess.CompletedProcess[str]]
MakeModel = Callable[..., Path]


def save_tokenizer(folder: Path) -> None:
    """A token a character, so that every text is written in one way only."""
    characters = Tokenizer(
        models.WordLevel({name: number for number, name in enumerate(VOCABULARY)}, "<unk>")
    )
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """A new tiny model's folder: the same for the same family and seed."""

    def make(family: str = "llama", seed: int = 0) -> Path:
        folder = tmp_path_factory.mktemp("models") / f"{family}-{seed}"
        lively_model(family, folder, seed, vocab_size=len(VOCABULARY))
        save_tokenizer(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def model_folder(make_model: MakeModel) -> Path:
    return make_model()


@pytest.fixture(scope="session")
def trunk(model_folder: Path) -> Iterator[TrunkProcess]:
    """The trunk of that model, cut 2/2/2."""
    with TrunkProcess(model_folder, "--session-tokens", "256") as process:
        yield process


@pytest.fixture(scope="session")
def splitlearn_here() -> Run:
    """The command in this process, which has torch already: where a new process would show nothing more."""

    def run(*words: object, said: str = "") -> subprocess.CompletedProcess[str]:
        ended = CliRunner().invoke(app, [*map(str, words)], input=said)
        return subprocess.CompletedProcess(words, ended.exit_code, ended.stdout, ended.stderr)

    return run


@pytest.fixture(scope="session")
def splitlearn() -> Run:
    """The real command, in a process of its own, with a deadline."""

    def run(*words: object, said: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "splitlearn.cli", *map(str, words)],
            input=said,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

    return run
