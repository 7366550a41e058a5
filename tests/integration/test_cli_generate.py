"""`splitlearn generate` gives the whole model's text, and says in one line what is wrong."""

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, set_seed

from splitlearn.testing.tiny import tiny_whole

pytestmark = pytest.mark.timeout(300)  # several processes, each of which loads torch

PROMPT = "To be cut, or not?"
NEW = 24
BOTH_WAYS_BYTES = 2 * 32 * 4  # a token's activation of 32 float32 numbers, to the trunk and back


def whole_ids(folder: Path, **how) -> list[int]:
    inputs = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    ids = tiny_whole(folder).generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=NEW, **how
    )
    return ids[0, inputs.input_ids.shape[1] :].tolist()


def text_of(folder: Path, ids: list[int]) -> str:
    return AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)


def one_line(stderr: str) -> str:
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_streams_the_whole_models_greedy_text(splitlearn, trunk, model_folder):
    done = splitlearn(
        "generate", model_folder, "--trunk", trunk.address, "--prompt", PROMPT, "--max-new-tokens", NEW
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == text_of(model_folder, whole_ids(model_folder, do_sample=False)) + "\n"
    assert "first token" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("cache", [True, False])
def test_json_has_the_tokens_and_the_bytes_that_crossed(splitlearn_here, trunk, model_folder, cache):
    words = ["generate", model_folder, "--trunk", trunk.address, "--prompt", "-", "--max-new-tokens", NEW]
    done = splitlearn_here(*words, "--json", *([] if cache else ["--no-cache"]), said=PROMPT + "\n")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    prompt, new = told["prompt_tokens"], told["tokens"]
    assert told["token_ids"] == whole_ids(model_folder, do_sample=False)
    assert prompt == len(PROMPT)
    sent = prompt + new - 1 if cache else sum(prompt + made for made in range(new))
    assert told["tensor_bytes"] == BOTH_WAYS_BYTES * sent
    assert told["tensor_bytes"] < told["sent_bytes"] + told["received_bytes"]
    assert told["time_to_first_token_s"] > 0
    assert told["tokens_per_s"] > 0
    assert done.stderr == ""


def test_a_seed_samples_what_the_whole_model_samples(splitlearn_here, trunk, model_folder):
    words = ["generate", model_folder, "--trunk", trunk.address, "--prompt", PROMPT, "--max-new-tokens", NEW]
    done = splitlearn_here(*words, "--json", "--temperature", 0.8, "--top-p", 0.9, "--seed", 7)
    assert done.returncode == 0, done.stderr
    set_seed(7)
    sampled = whole_ids(model_folder, do_sample=True, temperature=0.8, top_p=0.9)
    assert json.loads(done.stdout)["token_ids"] == sampled


def test_no_session_is_left_on_the_trunk(splitlearn_here, trunk, model_folder):
    from splitlearn.client.calls import describe

    splitlearn_here("generate", model_folder, "--trunk", trunk.address, "--prompt", PROMPT)
    assert describe(trunk.address, 10).sessions == 0


def test_nothing_listens_there(splitlearn, model_folder):
    done = splitlearn("generate", model_folder, "--trunk", f"127.0.0.1:{free_port()}", "--prompt", PROMPT)
    assert done.returncode == 1
    assert "splitlearn serve" in one_line(done.stderr)


@pytest.mark.parametrize("server", ["http", "silent"])
def test_what_listens_there_is_no_trunk(splitlearn_here, model_folder, server):
    with {"http": http_server, "silent": silent_server}[server]() as port:
        done = splitlearn_here("generate", model_folder, "--trunk", f"127.0.0.1:{port}", "--prompt", PROMPT)
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in one_line(done.stderr)


def test_the_trunk_is_of_another_model(splitlearn_here, trunk, make_model):
    other = make_model(seed=1)
    done = splitlearn_here("generate", other, "--trunk", trunk.address, "--prompt", PROMPT)
    assert done.returncode == 1
    assert "another model" in one_line(done.stderr)


def test_the_trunk_is_cut_elsewhere(splitlearn_here, trunk, model_folder):
    words = ["generate", model_folder, "--trunk", trunk.address, "--prompt", PROMPT]
    done = splitlearn_here(*words, "--bottom-layers", 3, "--top-layers", 2)
    assert done.returncode == 1
    assert "2/2/2" in one_line(done.stderr)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def http_server() -> Iterator[int]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextmanager
def silent_server() -> Iterator[int]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_tiny_tokenizer_gives_back_what_it_was_given(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == PROMPT
    assert ids.dtype == torch.long
