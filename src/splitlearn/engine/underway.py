"""The version that a member's step is computed at, and whether it is still worth going on with."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from splitlearn.engine.ledger import Ledger
from splitlearn.engine.member import Member
from splitlearn.engine.rules import Rule
from splitlearn.engine.trunk_state import AdapterVersion
from splitlearn.errors import ContributionLost, StaleGradient
from splitlearn.monitor import events

if TYPE_CHECKING:
    from splitlearn.engine.run import Run


class Underway:
    """Belongs to the engine's thread; looks at the steps that a cohort's members have begun."""

    def __init__(self, run: Run, rule: Rule, ledger: Ledger) -> None:
        self._run, self._rule, self._ledger = run, rule, ledger

    def pinned(self, member: Member, microbatch: int, ends_version: int | None = None) -> AdapterVersion:
        """What a step's forward is computed with: what its first one was.

        Where the run trains bottom and top, too, that is the version whose ends the member was given last,
        and `ends_version` is the one that it has.

        Raises:
            StaleGradient: it would be refused in the end; ContributionLost: what came before it is gone, or
                the client's bottom and top are of another version.
        """
        self.require_fresh(member)
        if member.base is None and microbatch:
            raise self.lost(member)
        if self._run.settings.share.is_sync:
            self._require_ends(member, ends_version)
        return member.pin()

    def require_fresh(self, member: Member) -> None:
        """Before more is computed for a step: raises StaleGradient where it would be refused in the end."""
        if member.base is not None and not self._rule.drops_late:
            self.require_not_stale(member, self._run.version - member.base.number)

    def require_underway(self, member: Member, adapter: AdapterVersion) -> None:
        """Before a gradient is added: the step was begun with this version, and would not be refused.

        Raises:
            StaleGradient: as `require_fresh`; ContributionLost: the step has begun anew since its forward.
        """
        self.require_fresh(member)
        if member.base is not adapter:
            raise self.lost(member)

    def require_not_stale(self, member: Member, staleness: int) -> None:
        """Raises StaleGradient where so many versions, or the seconds since its begin, are too many."""
        assert member.base is not None
        limit, limit_s = self._rule.staleness_limit, self._run.settings.cohort.age_limit_s
        age_s = time.monotonic() - member.began_at
        if staleness <= limit and (not limit_s or age_s <= limit_s):
            return
        version = member.base.number
        member.forget_gradients()
        self._ledger.add(events.Refused(member.name, member.next_step, version, staleness))
        allowed = f"{limit} versions" + (f" and {limit_s:g} s" if limit_s else "")
        raise StaleGradient(
            f"the gradients of member {member.name} are {staleness} versions and {age_s:.0f} s old, run "
            f"{self._run.name} allows {allowed}: compute them again",
            facts={"current_version": self._run.version, "staleness": staleness, "age_s": age_s},
        )

    def lost(self, member: Member) -> ContributionLost:
        """What is to be raised where a step's gradients are gone; what is left of them goes, too."""
        # All of it: the step is computed at one version.
        member.forget_gradients()
        return ContributionLost(
            f"step {member.next_step} of member {member.name} has no gradients here (the run was restored, "
            "or the member's lease had run out): compute it again",
            facts={"current_step": member.next_step},
        )

    def _require_ends(self, member: Member, ends_version: int | None) -> None:
        if not member.fits(ends_version) or self._is_too_late_to_begin(member):
            member.forget_gradients()
            raise ContributionLost(
                f"step {member.next_step} of member {member.name} was begun with a bottom and a top that run "
                f"{self._run.name} has trained since, or has not given: fetch them and compute it again",
                facts={"current_step": member.next_step, "current_version": self._run.version},
            )

    def _is_too_late_to_begin(self, member: Member) -> bool:
        """With the ends that it has, a step that begins now would be dropped or refused."""
        if member.base is not None or member.given is None:
            return False
        allowed = 0 if self._rule.drops_late else self._rule.staleness_limit
        return self._run.version - member.given.number > allowed
