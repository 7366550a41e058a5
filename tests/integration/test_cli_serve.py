"""`splitlearn serve`: ready when it says so, drained by a signal, and closed to the world."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from splitlearn import AutoSplitModelForCausalLM
from splitlearn.cli.trunk_process import TrunkProcess

pytestmark = pytest.mark.timeout(300)  # several processes, each of which loads torch

DEADLINE_S = 60
IDS = torch.tensor([[5, 6, 7, 8]])


@contextmanager
def serving(*words: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "splitlearn.cli", "serve", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


class AtToken:
    """A streamer that does something once so many tokens have come."""

    def __init__(self, number, act):
        self.left, self.act = number, act

    def put(self, value):
        self.left -= 1
        if self.left == 0:
            self.act()

    def end(self):
        pass


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_text_finish_and_exits_0(model_folder, stop):
    with serving(model_folder, "--port", 0) as server:
        line = server.stdout.readline()
        assert line.startswith("listening on 127.0.0.1:")
        model = AutoSplitModelForCausalLM.from_pretrained(
            model_folder, trunk=line.removeprefix("listening on ").strip()
        )
        ids = model.generate(
            IDS,
            max_new_tokens=40,
            min_new_tokens=40,
            do_sample=False,
            streamer=AtToken(5, lambda: server.send_signal(stop)),
        )
        model.close()
        rest, log = server.communicate(timeout=DEADLINE_S)
    assert ids.shape[1] == 44
    assert server.returncode == 0, log
    assert rest == ""
    assert "Traceback" not in log


def test_a_draining_server_takes_nobody_new(model_folder):
    with serving(model_folder, "--port", 0) as server:
        address = server.stdout.readline().removeprefix("listening on ").strip()
        refused = []

        def stop_and_knock():
            server.terminate()
            for _ in range(200):
                try:
                    AutoSplitModelForCausalLM.from_pretrained(model_folder, trunk=address).close()
                except Exception as error:
                    refused.append(error)
                    return

        model = AutoSplitModelForCausalLM.from_pretrained(model_folder, trunk=address)
        model.generate(IDS, max_new_tokens=20, do_sample=False, streamer=AtToken(5, stop_and_knock))
        model.close()
        server.communicate(timeout=DEADLINE_S)
    assert type(refused[0]).__name__ in ("TrunkDraining", "TrunkUnreachable")
    assert server.returncode == 0


def test_the_log_is_json_and_holds_no_text(splitlearn, model_folder):
    secret = "Zanzibar"
    with serving(model_folder, "--port", 0, "--log-json") as server:
        address = server.stdout.readline().removeprefix("listening on ").strip()
        done = splitlearn("generate", model_folder, "--trunk", address, "--prompt", secret)
        server.terminate()
        _, log = server.communicate(timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert events[:2] == ["loading", "serving"]
    assert events[-1] == "stopped"
    assert secret not in log
    assert done.stdout.strip() not in log


def test_a_taken_port_is_one_line(splitlearn, trunk, model_folder):
    port = trunk.address.rpartition(":")[2]
    done = splitlearn("serve", model_folder, "--port", port)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot listen on 127.0.0.1:{port}")


def test_other_machines_are_not_let_in_without_tls(splitlearn, model_folder):
    done = splitlearn("serve", model_folder, "--host", "0.0.0.0", "--port", 0)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no TLS" in line


def test_a_trunk_process_that_cannot_start_says_why(tmp_path):
    from splitlearn.errors import TrunkUnreachable

    with pytest.raises(TrunkUnreachable, match="there is no folder"), TrunkProcess(tmp_path / "none"):
        pass
