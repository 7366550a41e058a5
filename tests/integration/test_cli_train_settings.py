"""What `splitlearn train` is told reaches the run on the server, and the trainer."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from splitlearn import TrunkServer
from splitlearn.cli.main import app
from splitlearn.engine.run_requests import RunRequests
from splitlearn.model import devices
from splitlearn.vocabulary import RunSettings, TapeSettings
from splitlearn.wire.messages import OpenRun

SHORT = ["--max-steps", 4, "--accumulation", 1, "--batch-size", 2, "--max-tokens", 48, "--lora-r", 4]
Say = Callable[..., tuple[str, Path]]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[RunSettings]:
    """The settings of each run that the server was asked for."""
    seen: list[RunSettings] = []
    open_run = RunRequests.open

    def note(runs: RunRequests, client: bytes, asked: OpenRun) -> Any:
        seen.append(asked.settings)
        return open_run(runs, client, asked)

    monkeypatch.setattr(RunRequests, "open", note)
    return seen


@pytest.fixture
def train(model_folder: Path, tmp_path: Path) -> Iterator[Say]:
    """Runs the command; what it said on stderr, and its output folder."""
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": f"{n}?", "completion": f" The answer is {n}."} for n in range(20)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def say(name: str, *words: object, trunk: str | None = None) -> tuple[str, Path]:
        output = tmp_path / name
        told = [model_folder, "--trunk", trunk or server.address, "--data", data, "--output", output, *SHORT]
        done = CliRunner().invoke(app, [*map(str, ["train", *told, "--no-tensorboard", *words])])
        assert done.exit_code == 0, done.stderr
        return done.stderr, output

    sessions = {"session_tokens": 64, "kv_budget_bytes": 1 << 24}
    with TrunkServer(
        model_folder, port=0, device="cpu", sessions=sessions, state_dir=tmp_path / "state"
    ) as server:
        yield say


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def test_the_tapes_settings_reach_the_run_and_change_nothing_of_what_is_learned(train, opened, tmp_path):
    _, plain = train("plain")
    _, thrifty = train("thrifty", "--tape", "recompute")
    (tmp_path / "how.yaml").write_text("tape_checkpoint_every: 2\n")
    _, every = train("every", "--config", tmp_path / "how.yaml")
    assert [settings.tape for settings in opened] == [
        TapeSettings(),
        TapeSettings(recompute=True),
        TapeSettings(checkpoint_every=2),
    ]
    expected = adapter_of(plain)
    for output in (thrifty, every):
        found = adapter_of(output)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_part_may_have_a_learning_rate_of_its_own(train):
    """Rates so small that a weight of a part cannot move by one of them."""
    _, usual = train("usual")
    _, small = train("small", "--learning-rate-trunk", 1e-30, "--learning-rate-top", 1e-30)
    before, after = adapter_of(usual), adapter_of(small)
    b_weights = {name for name in after if "lora_B" in name}  # these begin with nothing but zeros
    still = {name for name in b_weights if after[name].abs().max() < 1e-20}
    assert still == {name for name in b_weights if int(name.split(".layers.")[1].split(".")[0]) >= 2}
    assert not {name for name in b_weights if before[name].abs().max() < 1e-20}


@pytest.mark.parametrize("in_file", [False, True], ids=["command line", "file"])
def test_what_is_done_about_anomalies_reaches_the_trainer(train, tmp_path, in_file):
    words = ["--anomaly-action", "stop", "--anomaly-vanishing-norm", 1e9]
    if in_file:
        file = tmp_path / "how.yaml"
        file.write_text("anomaly-action: stop\nanomaly_vanishing_norm: 1e9\n")
        words = ["--config", file]
    _, output = train("stopped", *words)
    assert json.loads((output / "result.json").read_text())["steps"] == 1
    assert (output / "checkpoint-1" / "splitlearn.json").is_file()
    assert yaml.safe_load((output / "train.yaml").read_text())["anomaly_vanishing_norm"] == 1e9


@pytest.mark.parametrize(("has", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_auto_precision_is_what_the_devices_have_and_is_told(train, opened, monkeypatch, has, chosen):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: has)
    told, output = train("auto")
    (line,) = [line for line in told.splitlines() if line.startswith("precision")]
    says = f"float32 weights on cpu, which has {'' if has else 'no '}bfloat16"
    assert line == f"precision {chosen}: here {says}; the trunk has {says}"
    assert [settings.precision.autocast for settings in opened] == ["bfloat16" if has else ""]
    assert yaml.safe_load((output / "train.yaml").read_text())["precision"] == chosen
    # What was chosen is what was trained in.
    same = adapter_of(output), adapter_of(train("told", "--precision", chosen)[1])
    other = adapter_of(train("other", "--precision", "float32" if has else "bfloat16")[1])
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    assert not all(torch.equal(same[0][name], other[name]) for name in other)


def test_a_resumed_training_keeps_the_precision_that_was_chosen(train, opened, monkeypatch):
    """Even on a machine where another one would be chosen."""
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)
    _, output = train("moved", "--save-steps", 2)
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    words = ["train", "--config", output / "train.yaml", "--resume", "--max-steps", 6]
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.stderr
    assert "precision" not in done.stderr
    assert [settings.precision.autocast for settings in opened] == ["bfloat16"]
