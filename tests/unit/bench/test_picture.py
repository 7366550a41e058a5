import importlib.util
from itertools import combinations

import pytest

from splitlearn.bench.picture import (
    DOTS_PER_INCH,
    SIZE_INCHES,
    Curve,
    draw,
    latency_curves,
    pace_curves,
    ticks_of,
    title_of,
)
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
CROWDED = LOAD | {
    "model": "/" + "a-long-way/" * 20 + "model",
    "settings": {"prompt_tokens": 128, "text_tokens": 4096, "trunk": "started here"},
    "rows": [
        {
            "sessions": n,
            "steps_per_s": 1e5 * n,
            "latency": dict.fromkeys(("p50_ms", "p95_ms", "p99_ms"), 1e4 * n),
        }
        for n in (1, 2, 3, 4, 5, 6, 7, 8, 30, 31, 32)
    ],
}
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def test_curves_go_by_the_number_of_sessions():
    assert pace_curves(LOAD) == [Curve("trunk, all sessions", [1, 20], [200.0, 900.0])]
    assert latency_curves(LOAD) == [
        Curve("half within (p50)", [1, 20], [5.0, 21.0]),
        Curve("99 % within (p99)", [1, 20], [9.0, 40.0]),
    ]


def test_the_whole_model_has_a_curve_where_it_was_run():
    assert [curve.name for curve in pace_curves(TEXTS)] == [
        "split, all sessions",
        "whole model, as many rows in one batch",
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


def test_numbers_below_the_axis_have_room():
    assert ticks_of([1, 2, 4, 8]) == [1, 2, 4, 8]
    assert ticks_of([1, 30, 31, 32]) == [1, 32]
    assert ticks_of([7]) == [7]


@needs_matplotlib
@pytest.mark.parametrize("report", [LOAD, TEXTS, CROWDED], ids=["load", "texts", "crowded"])
def test_a_picture_is_written_in_which_no_text_lies_on_another(report, tmp_path, monkeypatch):
    from matplotlib.text import Text

    boxes, write = {}, Text.draw

    def noted(text, renderer, *args, **how):
        if text.get_visible() and text.get_text():
            boxes[id(text)] = (text.get_text(), text.get_window_extent(renderer))
        write(text, renderer, *args, **how)

    monkeypatch.setattr(Text, "draw", noted)
    draw(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

    written = list(boxes.values())
    assert {"sessions at once", title_of(report)} <= {text for text, _ in written}
    overlaps = [(one, other) for (one, a), (other, b) in combinations(written, 2) if a.overlaps(b)]
    assert not overlaps
    width, height = (inches * DOTS_PER_INCH for inches in SIZE_INCHES)
    beyond = [text for text, box in written if not (0 <= box.x0 < box.x1 <= width)]
    assert not beyond
    assert not [text for text, box in written if not (0 <= box.y0 < box.y1 <= height)]


def test_the_title_says_what_was_measured():
    assert title_of(LOAD) == "rps: a model"
    assert title_of(CROWDED) == "rps: model (tokens: prompt 128, text 4096)"
