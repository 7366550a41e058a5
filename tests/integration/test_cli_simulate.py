"""`splitlearn simulate`: processes of its own, one of them killed and back, and nothing left of them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from splitlearn.cli.simulation.clients import Client
from splitlearn.cli.simulation.config import Simulation
from splitlearn.cli.simulation.config_file import read_simulation
from splitlearn.cli.simulation.simulation import simulate
from splitlearn.errors import SimulationFailed

pytestmark = pytest.mark.timeout(240)  # processes that load torch

WAIT_S = 90
STEPS = 6
HOW = {"max_tokens": 48, "learning_rate": 2e-2, "lora_r": 4, "precision": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty lines of one kind, which a small model soon learns."""
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [
        {"prompt": f"{n}?", "completion": f" The answer is {n}.", "label": str(n % 4)} for n in range(40)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def who_has_open(folder: Path) -> list[int]:
    """The processes with an open file in the folder: each of a simulation's has its log."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            opened = [os.readlink(each) for each in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(each.startswith(str(folder)) for each in opened):
            found.append(int(process.name))
    return found


def written(folder: Path, **told: object) -> Path:
    file = folder / "simulation.yaml"
    file.write_text(yaml.safe_dump(told))
    return file


def test_three_clients_one_killed_and_back_train_as_many_rounds_as_steps(
    splitlearn_here, model_folder, data, tmp_path
):
    output = tmp_path / "out"
    config = written(
        tmp_path,
        model=str(model_folder),
        data=str(data),
        output=str(output),
        clients=3,
        cohort={"rule": "sync", "clip_norm": 1.0},
        partition={"scheme": "dirichlet", "alpha": 1.0, "seed": 1},
        train={"max_steps": STEPS, "batch_size": 2, **HOW},
        stragglers=[{"client": 3, "factor": 1.5}],
        faults={"kill": [{"client": 2, "at_step": 3, "back_after_s": 0.5}]},
        deadline_s=WAIT_S,
    )
    done = splitlearn_here("simulate", config)
    assert done.returncode == 0, done.stderr
    assert who_has_open(output) == []

    told = json.loads((output / "summary.json").read_text())
    assert told["rounds"] == STEPS, "a round is each client's step, also that of the one who was killed"
    killed = told["clients"][1]
    assert (killed["starts"], killed["kills"]) == (2, 1)
    for client in told["clients"]:
        assert client["is_done"]
        assert (client["steps"], client["merged"]) == (STEPS, STEPS)
        lines = (output / "data" / f"{client['name']}.jsonl").read_text().splitlines()
        assert len(lines) == client["examples"]
        assert (output / "logs" / f"{client['name']}.log").stat().st_size
        assert any((output / "tensorboard" / client["name"]).glob("events*"))
    assert sum(client["examples"] for client in told["clients"]) == 36, "four of forty are held out"
    assert told["held_out_loss"] < told["held_out_loss_before"]
    adapters = [
        load_file(output / "clients" / client["name"] / "adapter" / "adapter_model.safetensors")
        for client in told["clients"]
    ]
    of_trunk = [name for name in adapters[0] if ".layers.2." in name or ".layers.3." in name]
    assert all((adapters[0][name] == other[name]).all() for other in adapters[1:] for name in of_trunk)
    assert "client-02" in done.stdout
    assert f"{STEPS} rounds of sync" in done.stdout


def small(model_folder: Path, data: Path, output: Path, **further: object) -> dict[str, object]:
    return {
        "model": str(model_folder),
        "data": str(data),
        "output": str(output),
        "clients": 2,
        "cohort": {"rule": "async"},
        "train": {"max_steps": 400, "tensorboard": False, **HOW},
        "deadline_s": WAIT_S,
        **further,
    }


def test_a_client_that_dies_unasked_ends_all_and_is_named_with_the_end_of_its_log(
    model_folder, data, tmp_path
):
    output = tmp_path / "out"

    def shoot(clients: Sequence[Client]) -> None:
        if clients[1].step >= 2:
            for process in who_has_open(output / "logs" / "client-02.log"):
                os.kill(process, signal.SIGKILL)

    with pytest.raises(
        SimulationFailed, match=r"(?s)client-02 died unasked with exit code -9 .*step \d+ of 400"
    ):
        simulate(Simulation(**small(model_folder, data, output)), shoot)
    assert who_has_open(output) == []
    assert not (output / "summary.json").exists()


def test_what_takes_too_long_is_given_up(model_folder, data, tmp_path):
    output = tmp_path / "out"
    config = Simulation(**small(model_folder, data, output, deadline_s=3))
    with pytest.raises(SimulationFailed, match=r"deadline_s = 3 has passed \(client-01"):
        simulate(config)
    assert who_has_open(output) == []


@pytest.mark.slow
def test_ctrl_c_ends_what_it_started_and_nothing_else(model_folder, data, tmp_path):
    output = tmp_path / "out"
    config = written(tmp_path, **small(model_folder, data, output))
    words = [sys.executable, "-m", "splitlearn.cli", "simulate", str(config)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    bystander = subprocess.Popen(["sleep", str(WAIT_S)])
    try:
        assert process.stderr is not None
        assert any("client-02: " in line and "step 2 of" in line for line in process.stderr)
        assert len(who_has_open(output)) >= 3
        # As a terminal does, to all of them.
        os.killpg(process.pid, signal.SIGINT)
        process.stderr.read()
        assert process.wait(WAIT_S) == 130
        assert who_has_open(output) == []
        assert bystander.poll() is None
    finally:
        bystander.kill()
        process.kill()


@pytest.mark.slow
def test_the_example_runs_as_it_is_printed(splitlearn_here, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = splitlearn_here("simulate", "--example").stdout
    file = tmp_path / "example.yaml"
    file.write_text(printed.replace("model: demo ", f"model: {model_folder} "))
    summary = simulate(read_simulation(file))
    assert [client.is_done for client in summary.clients] == [True] * 4
    assert [client.steps for client in summary.clients] == [8, 8, 8, 4]
    assert summary.clients[1].kills == 1
    assert sum(client.merged + client.dropped for client in summary.clients) == 28
    assert (tmp_path / "simulation" / "summary.json").is_file()
