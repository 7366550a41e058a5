"""Whether what a cohort's members are to share of their own ends makes sense: asked on both sides."""

from __future__ import annotations

import math

from splitlearn.errors import SettingError
from splitlearn.vocabulary import AVERAGING, SHARE_RULES, CohortSettings, ShareSettings


def require_sensible(share: ShareSettings, cohort: CohortSettings) -> None:
    """Before anything is shared.

    Raises:
        SettingError: there is no such rule or no cohort, or a figure makes no sense with the rule.
    """
    if share.rule not in SHARE_RULES:
        raise SettingError(f"there is no share rule {share.rule!r}: use one of {', '.join(SHARE_RULES)}")
    if share.every < 1:
        raise SettingError(f"every={share.every}: ends are averaged every so many steps, at least 1")
    if not (math.isfinite(share.proximal) and share.proximal >= 0):
        raise SettingError(f"proximal={share.proximal}: it must be a finite number, 0 or above")
    if share.proximal and not share.averages:
        raise SettingError(
            f"proximal={share.proximal:g} pulls towards an average, and share={share.rule!r} has none: use "
            f"one of {', '.join(AVERAGING)}"
        )
    if cohort.is_private and not share.is_personal:
        raise SettingError(
            f"share={share.rule!r} shares bottom and top with a cohort: give cohort=CohortSettings(...)"
        )
