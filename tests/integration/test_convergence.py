"""The benchmark of what each rule learns beside one client, made tiny: real server, real clients."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.timeout(300)  # several processes, each of which loads torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TOKENS = 5 * 8 * 23  # of five clients with eight rows of 24, whose first nothing predicts


@pytest.fixture
def convergence() -> Iterator[ModuleType]:
    if not BENCHMARKS.is_dir():
        pytest.skip("benchmarks/ is not here")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        module = importlib.import_module("convergence")
        patch.setattr(module._common, "RESULTS", module._common.RESULTS)  # the command sets it
        yield module


def test_sync_merges_every_token_and_learns_and_is_told_so(convergence, tmp_path, monkeypatch):
    words = ["convergence.py", "--tiny", "--rules", "sync", "--partitions", "iid", "--steps", "8"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(tmp_path)])
    convergence.main()
    figures = json.loads((tmp_path / "convergence.json").read_text())["figures"]
    found = figures["rules"]["sync/iid"]
    assert found["tokens"] == TOKENS
    assert found["loss"] < figures["before"] - 0.01
    assert found["points"][0] == [0.0, figures["before"]]
    assert "| sync | iid |" in (tmp_path / "convergence.md").read_text()
    assert (tmp_path / "convergence.png").stat().st_size > 10_000


def test_what_falls_short_is_named(convergence):
    report = importlib.import_module("_convergence_report")

    def figures(one: float, sync: float) -> dict:
        return {"before": 3.5, "rules": {"single/all": {"loss": one}, "sync/iid": {"loss": sync}}}

    assert report.shortcomings(figures(3.0, 3.02)) == []
    assert "0.3" in report.shortcomings(figures(3.3, 3.3))[0]
    assert "1 %" in report.shortcomings(figures(3.0, 3.04))[0]
    assert report.loss_at([(0.0, 4.0), (10.0, 3.0)], 5.0) == 3.5
    assert report.loss_at([(0.0, 4.0), (10.0, 3.0)], 11.0) is None
