"""`splitlearn train`, `export` and `runs`, against a trunk server in a process of its own."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from splitlearn.cli.main import app
from splitlearn.cli.trunk_process import TrunkProcess
from splitlearn.client.calls import list_runs
from splitlearn.testing.tiny import tiny_whole
from splitlearn.training.tokens import IGNORED

pytestmark = pytest.mark.timeout(300)  # processes that load torch

STEPS, SAVE_STEPS = 30, 3
WAIT_S = 60
TOLD = f"--max-steps {STEPS} --save-steps {SAVE_STEPS} --learning-rate 2e-2 --lora-r 4 --lora-dropout 0.1"
HOW = [*shlex.split(TOLD), "--max-tokens", "48", "--batch-size", "2", "--accumulation", "2"]
HOW += ["--precision", "float32"]  # the whole model that it is held against is in it


def say(*words: object) -> tuple[int, str, str]:
    """The command in this process, where torch is loaded already; its exit code, stdout and stderr."""
    done = CliRunner().invoke(app, [*map(str, words)])
    return done.exit_code, done.stdout, done.stderr


def error_of(*words: object) -> tuple[int, str]:
    code, _, errors = say(*words)
    (line,) = errors.splitlines()
    return code, line


@pytest.fixture(scope="module")
def trunk(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrunkProcess]:
    state = tmp_path_factory.mktemp("state")
    with TrunkProcess(model_folder, "--state-dir", str(state), "--tape-budget", "64MiB") as process:
        yield process
    assert any(state.rglob("adapter.safetensors")), "runs are saved where --state-dir says"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty lines of one kind, which a small model soon learns."""
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [{"prompt": f"{n}?", "completion": f" The answer is {n}."} for n in range(20)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def unbroken(trunk, model_folder, data, tmp_path_factory) -> Path:
    """The output of a training that nothing has stopped; half of its settings stand in a file."""
    root = tmp_path_factory.mktemp("unbroken")
    config = root / "how.yaml"
    told = {"data": [str(data)], "held-out": 0.2, "seed": 7, "learning_rate": 9e9, "run": "unbroken"}
    config.write_text(yaml.safe_dump(told))
    words = ["train", model_folder, "--trunk", trunk.address, "--config", config, "--output", root / "out"]
    code, shown, errors = say(*words, *HOW, "--no-tensorboard")
    assert code == 0, errors
    assert "held-out loss" in shown
    assert f"after {STEPS} steps of run unbroken" in shown
    assert f"step {STEPS} of {STEPS}: loss" in errors
    return root / "out"


@pytest.fixture(scope="module")
def resumed(trunk, model_folder, data, tmp_path_factory) -> Path:
    """The output of the same training, stopped by a signal and resumed by what it wrote about itself."""
    output = tmp_path_factory.mktemp("resumed") / "out"
    words = ["train", model_folder, "--trunk", trunk.address, "--data", data, "--output", output]
    words += [*HOW, "--held-out", "0.2", "--seed", "7", "--no-tensorboard"]
    process = subprocess.Popen([sys.executable, "-m", "splitlearn.cli", *map(str, words)])
    due = time.monotonic() + WAIT_S
    while not (output / f"checkpoint-{2 * SAVE_STEPS}" / "splitlearn.json").is_file():
        assert process.poll() is None
        assert time.monotonic() < due
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 143
    assert not (output / "adapter").exists()
    code, _, errors = say("train", "--config", output / "train.yaml", "--resume")
    assert code == 0, errors
    return output


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def test_a_stopped_and_resumed_training_gives_the_unbroken_ones_adapter_bit_for_bit(unbroken, resumed):
    ours, theirs = adapter_of(resumed), adapter_of(unbroken)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    results = [json.loads((each / "result.json").read_text()) for each in (unbroken, resumed)]
    assert {result.pop("run") == "unbroken" for result in results} == {True, False}
    assert results[0] == results[1]


def test_the_held_out_loss_is_the_whole_models_mean_over_learned_tokens(unbroken, model_folder, data):
    from splitlearn.training.data import training_data

    told = json.loads((unbroken / "result.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    held_out = training_data(data, tokenizer, max_tokens=48, held_out_share=0.2, seed=7).held_out
    bare = tiny_whole(model_folder)
    adapted = PeftModel.from_pretrained(tiny_whole(model_folder), unbroken / "adapter").eval()
    for model, when in ((bare, "before"), (adapted, "after")):
        terms = []
        for example in held_out:
            ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
            with torch.no_grad():
                logits = model(ids).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits[0], labels[0, 1:], reduction="none")
            terms += loss[labels[0, 1:] != IGNORED].tolist()
        assert sum(terms) / len(terms) == pytest.approx(told[f"held_out_loss_{when}"], rel=1e-5)
    assert told["held_out_loss_after"] < 0.95 * told["held_out_loss_before"]


def test_only_so_many_checkpoints_are_kept_on_both_sides(unbroken, trunk):
    kept = {f"checkpoint-{STEPS}", f"checkpoint-{STEPS - SAVE_STEPS}"}
    assert {path.name for path in unbroken.glob("checkpoint-*")} == kept
    (run,) = [run for run in list_runs(trunk.address, 10) if run.name == "unbroken"]
    one_more = {f"checkpoint-{STEPS - 2 * SAVE_STEPS}"}  # goes at the next save
    assert {f"checkpoint-{step}" for step in run.checkpoints} == kept | one_more


def test_export_writes_a_folder_that_peft_loads_and_merge_a_model_of_its_own(
    unbroken, model_folder, tmp_path
):
    code, shown, errors = say("export", unbroken, "--output", tmp_path / "adapter")
    assert code == 0, errors
    assert shown.startswith(f"{tmp_path / 'adapter'}: an adapter for {model_folder}")
    code, shown, errors = say("export", unbroken, "--merge", "--output", tmp_path / "merged")
    assert code == 0, errors
    ids = torch.tensor([[5, 17, 42, 8, 33]])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(tiny_whole(model_folder), tmp_path / "adapter").eval()
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        expected = adapted(ids).logits
        assert torch.allclose(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(tiny_whole(model_folder)(ids).logits, expected, rtol=1e-2, atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("Hi").input_ids


def test_export_refuses_another_models_adapter_and_a_folder_without_one(unbroken, make_model, tmp_path):
    other = make_model("gpt2")
    code, line = error_of("export", unbroken, "--model", other, "--output", tmp_path / "out")
    assert (code, "--model" in line) == (1, True)
    code, line = error_of("export", tmp_path, "--output", tmp_path / "out")
    assert (code, "has no adapter" in line) == (1, True)
    assert not (tmp_path / "out").exists()


def test_what_was_trained_can_be_gone_on_from_and_parts_be_frozen(
    unbroken, trunk, model_folder, data, tmp_path
):
    words = ["train", model_folder, "--trunk", trunk.address, "--data", data, "--no-tensorboard"]
    words += ["--start-from", unbroken / "adapter", "--freeze", "bottom", "--freeze", "top"]
    code, _, errors = say(*words, "--output", tmp_path / "on", "--max-steps", 1, "--max-tokens", 48)
    assert code == 0, errors
    before, after = adapter_of(unbroken), adapter_of(tmp_path / "on")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".layers.2." in name or ".layers.3." in name for name in changed)


def test_parts_can_be_trained_in_full_and_merged(trunk, model_folder, data, tmp_path):
    words = ["train", model_folder, "--trunk", trunk.address, "--data", data, "--no-tensorboard"]
    words += ["--full", "bottom", "--full", "top", "--output", tmp_path / "out", "--save-steps", 1]
    code, _, errors = say(*words, "--max-steps", 1, "--max-tokens", 48, "--held-out", 0)
    assert code == 0, errors
    code, _, errors = say("export", tmp_path / "out", "--merge", "--output", tmp_path / "merged")
    assert code == 0, errors
    before, after = (
        AutoModelForCausalLM.from_pretrained(each) for each in (model_folder, tmp_path / "merged")
    )
    kept = {name for name, each in before.named_parameters() if torch.equal(each, after.get_parameter(name))}
    assert not torch.equal(before.model.norm.weight, after.model.norm.weight)
    assert all(".layers.2." in name or ".layers.3." in name for name in kept)


def test_runs_are_listed_and_deleted(unbroken, resumed, trunk):
    code, shown, _ = say("runs", trunk.address)
    assert code == 0
    assert "unbroken" in shown
    told = json.loads(say("runs", trunk.address, "--json")[1])["runs"]
    (run,) = [run for run in told if run["name"] == "unbroken"]
    assert (run["step"], run["checkpoints"][-1]) == (STEPS, STEPS)
    assert run["bytes_on_disk"] > 1000
    name = json.loads((resumed / "result.json").read_text())["run"]
    assert say("runs", trunk.address, "--delete", name)[0] == 0
    assert name not in say("runs", trunk.address)[1]
    code, line = error_of("runs", trunk.address, "--delete", name)
    assert (code, name in line) == (1, True)


# ---------------------------------------------------------------- one line for what is wrong


@pytest.fixture
def words(trunk, model_folder, data, tmp_path) -> list[object]:
    return ["train", model_folder, "--trunk", trunk.address, "--data", data, "--output", tmp_path / "out"]


@pytest.mark.parametrize(
    ("written", "code", "told"),
    [
        ("learning-rat: 1e-4", 1, "did you mean learning_rate"),
        ("config: other.yaml", 1, "no setting config"),
        ("lora_r: 8.5", 2, "--lora-r"),
        ("run: [a, b]", 1, "run is a list"),
        ("- data", 1, "no list of settings"),
        ("run: {", 1, "how.yaml:1: this is not YAML"),
        ("held_out: 1.5", 2, "held_out = 1.5"),
    ],
)
def test_a_config_that_is_wrong(words, tmp_path, written, code, told):
    (tmp_path / "how.yaml").write_text(written)
    assert error_of(*words, "--config", tmp_path / "how.yaml")[0] == code
    assert told in error_of(*words, "--config", tmp_path / "how.yaml")[1]
    assert not (tmp_path / "out").exists()


def test_a_line_that_is_no_example_is_named(words, tmp_path, data):
    file = tmp_path / "bad.jsonl"
    file.write_text(data.read_text() + '{"prompt": "and?"}\n')
    code, line = error_of(*words, "--data", file)
    assert (code, f"{file}:21: " in line) == (1, True)


def test_a_run_and_a_folder_that_are_there_are_not_written_over(words, unbroken):
    code, line = error_of(*words, "--run", "unbroken")
    assert (code, f"at step {STEPS}" in line) == (1, True)
    code, line = error_of(*words, "--output", unbroken)
    assert (code, "--resume" in line) == (1, True)


def test_nothing_can_be_resumed_where_nothing_was_saved(words, unbroken):
    code, line = error_of(*words, "--resume")
    assert (code, "no whole checkpoint" in line) == (1, True)
    code, line = error_of(*words, "--output", unbroken, "--resume", "--run", "another")
    assert (code, "of run unbroken" in line) == (1, True)


def test_two_members_train_one_trunk_and_the_server_tells_them_of_each_other(
    trunk, model_folder, data, tmp_path
):
    lines = data.read_text().splitlines(keepends=True)
    for member, held in (("a", lines[:8]), ("b", lines[8:])):
        (tmp_path / f"{member}.jsonl").write_text("".join(held))
    shared = ["train", model_folder, "--trunk", trunk.address, "--run", "together"]
    shared += ["--max-steps", 3, "--accumulation", 1, "--max-tokens", 48, "--precision", "float32"]
    shared += ["--cohort", "sync", "--members", 2, "--clip-norm", 1, "--no-tensorboard"]

    def words_of(member: str) -> list[object]:
        own = ["--data", tmp_path / f"{member}.jsonl", "--output", tmp_path / member, "--member", member]
        return [*shared, *own]

    # Each in a process of its own: accelerate's settings are a process's.
    other = subprocess.Popen([sys.executable, "-m", "splitlearn.cli", *map(str, words_of("a"))])
    try:
        code, _, errors = say(*words_of("b"))
        assert code == 0, errors
        assert other.wait(WAIT_S) == 0
    finally:
        other.kill()
    ours, theirs = adapter_of(tmp_path / "a"), adapter_of(tmp_path / "b")
    of_trunk = [name for name in ours if ".layers.2." in name or ".layers.3." in name]
    assert of_trunk
    assert all(torch.equal(ours[name], theirs[name]) for name in of_trunk)
    assert not all(torch.equal(ours[name], theirs[name]) for name in ours), (
        "bottom and top are each one's own"
    )

    words = ["members", "together", "--trunk", trunk.address, "--member-key"]
    code, shown, errors = say(*words, tmp_path / "b" / "member.key")
    assert code == 0, errors
    rows = [line.split() for line in shown.splitlines() if line.strip().startswith(("a ", "b "))]
    expected = [["left", "1", "3", "-", "-", "merged", "in", "round", "3"]] * 2
    assert sorted(rows) == [[each, *row] for each, row in zip("ab", expected, strict=True)]
    code, shown, _ = say(*words, tmp_path / "b" / "member.key", "--json")
    assert json.loads(shown)["cohort"]["rule"] == "sync"
    (tmp_path / "strangers.key").write_text(16 * "ab" + "\n")
    code, line = error_of(*words, tmp_path / "strangers.key")
    assert code == 1
    assert "has 2 members" in line
    assert "key of none of them" in line
    code, shown, _ = say("runs", trunk.address)
    assert "sync 0 of 2 2, 3" in " ".join(shown.split())
    # Begun again under its name, it goes on: what counts already is not given a second time.
    shutil.rmtree(tmp_path / "b" / "adapter")
    shutil.rmtree(tmp_path / "b" / "checkpoint-3")
    code, _, errors = say(*words_of("b"), "--max-steps", 4)
    assert code == 0, errors
    (run,) = [run for run in list_runs(trunk.address, 10) if run.name == "together"]
    assert run.step == 4
