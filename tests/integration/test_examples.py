"""Every example runs as it is, on a tiny model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)  # several processes, each of which loads torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, words)], capture_output=True, text=True, timeout=180
    )


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "benchmark_acceleration.py",
        "federated_learning.py",
        "generate_with_cache.py",
        "multi_client_training.py",
        "train_lora.py",
    }


def test_generate_with_cache_starts_its_own_server(model_folder):
    done = run("generate_with_cache.py", "--model", model_folder, "--new-tokens", 8)
    assert done.returncode == 0, done.stderr
    assert "without cache" in done.stdout
    assert "The cache saves" in done.stdout


def test_generate_with_cache_takes_a_server_that_runs(model_folder, trunk):
    done = run("generate_with_cache.py", "--model", model_folder, "--trunk", trunk.address, "--new-tokens", 8)
    assert done.returncode == 0, done.stderr


def test_benchmark_acceleration_measures_every_option(model_folder):
    done = run("benchmark_acceleration.py", "--model", model_folder, "--sessions", 3, "--seconds", 0.5)
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.startswith("options")
    assert [row.split()[-1] for row in rows] == ["0"] * 4
    assert rows[1].startswith("one step at a time")
    assert float(rows[1].split()[-4]) < 2


def test_train_lora_starts_its_own_server_and_learns(model_folder, tmp_path):
    words = ["--model", model_folder, "--steps", 8, "--learning-rate", 2e-2, "--output", tmp_path / "adapter"]
    done = run("train_lora.py", *words)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "loss" in line and not line.startswith("{")]
    before, after, whole = (float(line.split()[-1]) for line in told)
    assert after < before
    assert whole == pytest.approx(after, abs=2e-4)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def held_out_losses(said: str) -> tuple[float, float]:
    """Before and after."""
    before, after = (float(line.split()[-1]) for line in said.splitlines() if line.startswith("held-out"))
    return before, after


def test_multi_client_training_makes_rounds_of_all_and_learns(tmp_path):
    done = run("multi_client_training.py", "--learning-rate", 2e-2, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = held_out_losses(done.stdout)
    assert after < before
    steps = [line for line in done.stdout.splitlines() if ": step " in line]
    assert len(steps) == 24
    assert sorted(line.rpartition(" ")[2] for line in steps) == sorted(3 * [str(at) for at in range(1, 9)])
    assert (tmp_path / "adapter_config.json").is_file()


def test_federated_learning_goes_on_after_a_death_and_learns():
    done = run("federated_learning.py", "--learning-rate", 2e-2)
    assert done.returncode == 0, done.stderr
    before, after = held_out_losses(done.stdout)
    assert after < before
    killed, back = (int(re.search(f"{what} step (\\d+)", done.stdout)[1]) for what in ("after", "at"))
    assert 4 <= killed < back <= 8, "it has gone on where it was, and not begun anew"
