"""What a member is told is whole, and has an effect, or is refused with what to do."""

import io

import pytest

from splitlearn.cli.cohort_options import CohortFigures, MemberOptions
from splitlearn.cli.members import table_of
from splitlearn.errors import SettingError
from splitlearn.vocabulary import CohortSettings, Fate, Merged, RunSettings
from splitlearn.wire.messages import MemberFacts, RunFacts

WHOLE = {"cohort": "sync", "members": 2, "member": "ward-3"}


def test_the_figures_become_the_cohorts_and_what_is_left_out_is_the_rules_own():
    told = MemberOptions(cohort="quorum", members=5, member="a")
    figures = CohortFigures(quorum=3, round_timeout=2.5, carry_late=True, weighting="equal")
    expected = CohortSettings("quorum", 5, quorum=3, timeout_s=2.5, carry_late=True, weighting="equal")
    assert told.shared("notes", figures) == expected
    assert MemberOptions().shared(None, CohortFigures()) is None


@pytest.mark.parametrize(
    ("left_out", "told"),
    [("run", WHOLE), ("members", WHOLE), ("member", WHOLE)],
)
def test_what_is_missing_is_named(left_out, told):
    run = None if left_out == "run" else "notes"
    kept = {name: value for name, value in told.items() if name != left_out}
    with pytest.raises(SettingError, match=f"--cohort needs --{left_out}, too"):
        MemberOptions(**kept).shared(run, CohortFigures())


@pytest.mark.parametrize(
    ("options", "figures", "words"),
    [
        ({"member": "a"}, {}, "--member has no effect without --cohort"),
        ({}, {"clip_norm": 1.0}, "--clip-norm has no effect without --cohort"),
        (WHOLE, {"quorum": 2}, "--quorum has no effect with the rule sync"),
        (WHOLE, {"round_timeout": 2}, "--round-timeout has no effect with the rule sync"),
        (WHOLE | {"cohort": "async"}, {"buffer": 2}, "or take buffered"),
        (WHOLE | {"cohort": "quorum"}, {"quorum": 3}, "a quorum of 3 in a cohort of 2"),
        (WHOLE | {"cohort": "buffered"}, {}, "buffer"),
    ],
)
def test_what_has_no_effect_or_makes_no_round_is_refused(options, figures, words):
    with pytest.raises(SettingError, match=words):
        MemberOptions(**options).shared("notes", CohortFigures(**figures))


def test_the_table_says_where_each_member_stands():
    from rich.console import Console

    members = (
        MemberFacts("a", "active", 2, 7, 41.6, Merged(Fate.MERGED, 9, 2, 3), 8),
        MemberFacts("b", "lapsed", 1, 3, 0.0, Merged(Fate.DROPPED, 0, 4), None),
        MemberFacts("c", "left", 1, 0),
        MemberFacts("d", "left", 1, 1),
    )
    cohort = RunSettings(cohort=CohortSettings("async"))
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(table_of(RunFacts("notes", version=9, settings=cohort, members=members)))
    rows = [" ".join(line.split()) for line in console.export_text().splitlines()][1:]
    assert rows == [
        "a active 2 7 8, 1 behind 42 s merged in round 9, 2 versions old",
        "b lapsed 1 3 - - dropped, 4 versions old",
        "c left 1 0 - - nothing yet",
        "d left 1 1 - - skipped",
    ]
