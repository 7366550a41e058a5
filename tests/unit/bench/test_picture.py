import importlib.util

import pytest

from splitlearn.bench.picture import Curve, draw, latency_curves, pace_curves
from splitlearn.errors import SettingError

LOAD = {
    "question": "rps",
    "model": "a model",
    "rows": [
        {"sessions": 20, "steps_per_s": 900.0, "latency": {"p50_ms": 21.0, "p99_ms": 40.0}},
        {"sessions": 1, "steps_per_s": 200.0, "latency": {"p50_ms": 5.0, "p99_ms": 9.0}},
    ],
}
TEXTS = {
    "question": "decode",
    "model": "a model",
    "rows": [{"sessions": 4, "tokens_per_s": 30.0, "whole_tokens_per_s": 40.0, "latency": {"p50_ms": 120.0}}],
}
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def test_curves_go_by_the_number_of_sessions():
    assert pace_curves(LOAD) == [Curve("trunk", [1, 20], [200.0, 900.0])]
    assert latency_curves(LOAD) == [Curve("p50", [1, 20], [5.0, 21.0]), Curve("p99", [1, 20], [9.0, 40.0])]


def test_the_whole_model_has_a_curve_where_it_was_run():
    assert [curve.name for curve in pace_curves(TEXTS)] == [
        "split, all sessions",
        "whole model, as one batch",
    ]
    alone = {"rows": [TEXTS["rows"][0] | {"whole_tokens_per_s": 0.0}]}
    assert [curve.name for curve in pace_curves(alone)] == ["split, all sessions"]


@pytest.mark.parametrize("report", [{}, {"rows": []}, {"rows": [{"steps_per_s": 1.0}]}])
def test_a_report_without_figures_against_sessions_is_refused(report):
    with pytest.raises(SettingError, match="splitlearn bench"):
        pace_curves(report)


def test_where_matplotlib_is_missing_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"pip install 'splitlearn\[bench\]'"):
        draw(LOAD, tmp_path / "picture.png")


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
@pytest.mark.parametrize("report", [LOAD, TEXTS], ids=lambda report: report["question"])
def test_a_picture_is_written(report, tmp_path):
    draw(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
