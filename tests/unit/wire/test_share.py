"""Settings of sharing that make no sense are refused before anything is shared."""

import math

import pytest

from splitlearn.client.run import require_same
from splitlearn.errors import SettingError
from splitlearn.vocabulary import SHARE_RULES, CohortSettings, RunSettings, ShareSettings
from splitlearn.wire.share import require_sensible

COHORT = CohortSettings("sync", members=2)
WRONG = {
    "no share rule 'fedsgd'": ShareSettings("fedsgd"),
    "every=0": ShareSettings("fedavg", every=0),
    "proximal=-0.1": ShareSettings("fedavg", proximal=-0.1),
    "proximal=nan": ShareSettings("fedavg", proximal=math.nan),
    "pulls towards an average": ShareSettings("sync", proximal=0.1),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_makes_no_sense_is_refused(message):
    with pytest.raises(SettingError, match=message):
        require_sensible(WRONG[message], COHORT)


@pytest.mark.parametrize("rule", SHARE_RULES)
def test_a_rule_is_taken_and_needs_a_cohort(rule):
    require_sensible(ShareSettings(rule), COHORT)
    if rule != "personal":
        with pytest.raises(SettingError, match="cohort="):
            require_sensible(ShareSettings(rule), CohortSettings())


@pytest.mark.parametrize(
    ("asked", "differs"),
    [
        (ShareSettings("ffa", 3), "share's rule: fedavg, not ffa"),
        (ShareSettings("fedavg", 4), "every: 3, not 4"),
        (ShareSettings("fedavg", 3, 0.5), "proximal: 0.0, not 0.5"),
    ],
)
def test_who_joins_shares_alike(asked, differs):
    there = RunSettings(share=ShareSettings("fedavg", 3))
    require_same("notes", there, there)
    with pytest.raises(SettingError, match=differs):
        require_same("notes", there, RunSettings(share=asked))
