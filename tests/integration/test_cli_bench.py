"""bench, each of its measurements as its user runs it; how fast it is on this machine nobody promises."""

import importlib.util
import json

import pytest

from splitlearn.cli.trunk_process import TrunkProcess

pytestmark = pytest.mark.timeout(300)  # several processes, each of which loads torch

RPS = ("bench", "rps", "--seconds", 1, "--prompt-tokens", 4, "--text-tokens", 24)
DECODE = ("bench", "decode", "--prompt-tokens", 4, "--new-tokens", 6)


def test_rps_counts_steps_of_many_sessions_from_two_processes(splitlearn, trunk, model_folder):
    words = ["--trunk", trunk.address, "--sessions", "1,6", "--processes", 2, "--json"]
    done = splitlearn(*RPS, model_folder, *words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["sessions"] for row in report["rows"]] == [1, 6]
    for row in report["rows"]:
        assert (row["failed"], row["errors"]) == (0, {})
        assert row["steps"] == row["steps_per_s"] > 0
        assert 0 < row["latency"]["p50_ms"] <= row["latency"]["p95_ms"] <= row["latency"]["p99_ms"]
        assert 1 <= row["steps_per_batch"] <= row["sessions"]


def test_rps_starts_a_trunk_of_its_own(splitlearn_here, model_folder, tmp_path):
    done = splitlearn_here(*RPS, model_folder, "--sessions", 2, "--output", tmp_path / "rps.json")
    assert done.returncode == 0, done.stderr
    assert "steps/s" in done.stdout
    report = json.loads((tmp_path / "rps.json").read_text())
    assert report["settings"]["trunk"] == "started here"
    assert report["rows"][0]["failed"] == 0


def test_a_server_that_is_told_to_batch_nothing_runs_one_step_at_a_time(splitlearn_here, model_folder):
    with TrunkProcess(model_folder, "--max-batch-rows", "1", "--wait-ms", "0") as trunk:
        done = splitlearn_here(*RPS, model_folder, "--trunk", trunk.address, "--sessions", 4, "--json")
    assert done.returncode == 0, done.stderr
    # Two steps that took equally long are told for one batch.
    assert json.loads(done.stdout)["rows"][0]["steps_per_batch"] < 2


def test_rps_refuses_texts_that_the_trunk_has_no_room_for(splitlearn_here, trunk, model_folder):
    done = splitlearn_here("bench", "rps", model_folder, "--trunk", trunk.address, "--text-tokens", 1000)
    assert done.returncode == 1
    assert "takes 256" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_decode_counts_every_token_of_split_and_whole(splitlearn, trunk, model_folder, tmp_path):
    words = ["--trunk", trunk.address, "--sessions", "2", "--rounds", 2, "--json"]
    done = splitlearn(*DECODE, model_folder, *words)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["sessions"], row["tokens"]) for row in rows] == [(2, 2 * 2 * 6)]
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert row["whole_tokens_per_s"] > 0
        assert row["ratio"] > 0
        assert row["latency"]["p50_ms"] > 0


def test_decode_leaves_the_whole_model_out_where_the_folder_has_not_all_of_it(
    splitlearn_here, trunk, model_folder, tmp_path
):
    sliced = tmp_path / "client"
    assert splitlearn_here("slice", model_folder, "--part", "client", "--output", sliced).returncode == 0
    done = splitlearn_here(*DECODE, sliced, "--trunk", trunk.address, "--sessions", 1)
    assert done.returncode == 0, done.stderr
    assert "whole" not in done.stdout


def test_plot_says_what_it_needs(splitlearn_here, tmp_path):
    figures = tmp_path / "figures.json"
    rows = [{"sessions": 1, "steps_per_s": 1.0, "latency": {"p50_ms": 1.0}}]
    figures.write_text(json.dumps({"question": "rps", "model": "m", "rows": rows}))
    done = splitlearn_here("bench", "plot", figures, "--output", tmp_path / "picture.png")
    if importlib.util.find_spec("matplotlib") is None:
        assert done.returncode == 1
        assert done.stderr.startswith("error: a picture needs matplotlib")
    else:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "picture.png").is_file()


def test_bench_without_a_question_says_how_to_ask(splitlearn_here):
    done = splitlearn_here("bench")
    assert done.returncode == 2
    assert "splitlearn bench --help" in done.stderr
