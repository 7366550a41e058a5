import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.bench.latencies import Latencies, Percentiles

DURATIONS = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=200)
A_HUNDREDTH = 0.01


@given(DURATIONS)
def test_half_are_done_within_the_median_to_a_hundredth(durations):
    exact = statistics.median_low(durations)
    assert Latencies.of(durations).within_s(0.5) == pytest.approx(exact, rel=A_HUNDREDTH)


@given(DURATIONS)
def test_all_are_done_within_the_longest(durations):
    assert Latencies.of(durations).within_s(1.0) == pytest.approx(max(durations), rel=A_HUNDREDTH)


def test_of_a_hundred_the_99th_is_the_slowest_but_one():
    noted = Latencies.of(number / 1000 for number in range(1, 101))
    found = noted.percentiles()
    assert (found.p50_ms, found.p95_ms, found.p99_ms) == pytest.approx((50, 95, 99), rel=A_HUNDREDTH)


@given(DURATIONS, DURATIONS)
def test_two_processes_durations_add_up_to_those_of_one(here, there):
    together = Latencies.of(here)
    together.add(Latencies.of(there))
    assert together.counts == Latencies.of(here + there).counts
    assert len(together) == len(here) + len(there)


def test_nothing_took_no_time():
    assert Latencies().percentiles() == Percentiles(0.0, 0.0, 0.0)
    assert len(Latencies.of([0.0])) == 1
