"""An anomaly is told from what is usual, and is answered as its user wants."""

import math

import pytest

from splitlearn.config import AnomalyConfig
from splitlearn.training.anomaly import AnomalyWatch, Verdict

USUAL = [1.0, 1.2, 0.9, 1.1] * 5


def watch(**how) -> AnomalyWatch:
    watch = AnomalyWatch(AnomalyConfig(**how))
    for step, norm in enumerate(USUAL):
        assert watch.judge(norm, step) == Verdict()
    return watch


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_what_is_no_number_is_skipped_without_being_asked_for(norm):
    seen = watch()
    assert seen.judge(norm, 20).skip
    assert seen.judge(1.0, 21) == Verdict()
    assert seen.seen == {"not_finite": 1}


@pytest.mark.parametrize(("norm", "kind"), [(1e6, "spike"), (1e-9, "vanished")])
def test_leaps_and_vanishing_are_looked_for_where_that_is_set(norm, kind):
    assert watch().judge(norm, 20) == Verdict()
    assert watch(spike_factor=10, vanishing_norm=1e-6).judge(norm, 20) == Verdict(kind, skip=True)


def test_a_spike_is_no_measure_for_the_next():
    seen = watch(spike_factor=10)
    assert [seen.judge(100.0, step).skip for step in range(30)] == [True] * 30


def test_nothing_is_a_spike_before_there_is_a_history():
    seen = AnomalyWatch(AnomalyConfig(spike_factor=2, min_history=3))
    assert [seen.judge(norm, 0).kind for norm in (1.0, 50.0, 1.0, 50.0)] == ["", "", "", "spike"]


def test_slow_lowers_the_rate_for_a_while_and_skips_what_is_no_number():
    seen = watch(action="slow", spike_factor=10, slow_factor=0.5, slow_steps=2)
    rates = [seen.judge(norm, 0).rate for norm in (100.0, 1.0, 1.0, 1.0)]
    assert rates == [0.5, 0.5, 0.5, 1.0]
    assert seen.judge(math.nan, 0).skip


def test_stop_skips_the_step_and_says_so():
    verdict = watch(action="stop").judge(math.nan, 0)
    assert (verdict.skip, verdict.stop) == (True, True)
