"""When a cohort's round is closed: a file a rule, by the names that settings have for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from splitlearn.engine.rules.asynchronous import Asynchronous
from splitlearn.engine.rules.buffered import Buffered
from splitlearn.engine.rules.quorum import Quorum
from splitlearn.engine.rules.rule import OpenRound, Rule
from splitlearn.engine.rules.sync import Sync
from splitlearn.errors import SettingError
from splitlearn.vocabulary import PRIVATE, CohortSettings

RULES: Mapping[str, Callable[[CohortSettings], Rule]] = {
    "sync": lambda settings: Sync(),
    "quorum": Quorum.of,
    "async": Asynchronous.of,
    "buffered": Buffered.of,
}
WEIGHTINGS = ("tokens", "examples", "equal")

__all__ = ["RULES", "OpenRound", "Rule", "require_known", "rule_of"]


def require_known(settings: CohortSettings) -> None:
    """Raises SettingError where there is no such rule, or its figures make no round."""
    if settings.is_private:
        return
    if settings.rule not in RULES:
        raise SettingError(
            f"there is no cohort rule {settings.rule!r}: use one of {', '.join((PRIVATE, *RULES))}"
        )
    if settings.weighting not in WEIGHTINGS:
        raise SettingError(
            f"a cohort weighs by {', '.join(WEIGHTINGS)}, not by {settings.weighting!r}: choose one of these"
        )
    if settings.members < 1:
        raise SettingError("a cohort expects at least one member: set members=")
    rule_of(settings)


def rule_of(settings: CohortSettings) -> Rule:
    """Raises SettingError where the rule's figures make no round."""
    return RULES[settings.rule](settings)
