"""Who the members of a run are, and who of them is there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitlearn.engine.ledger import Ledger
from splitlearn.engine.member import Event, Member, State, key_of
from splitlearn.errors import MessageError
from splitlearn.monitor import events

if TYPE_CHECKING:
    from splitlearn.engine.run import Run


class Roster:
    """Belongs to the engine's thread; whoever comes and goes is in the ledger."""

    def __init__(self, run: Run, lease_s: float, ledger: Ledger) -> None:
        self.members: dict[str, Member] = {}
        self.ledger = ledger
        self._run, self._lease_s = run, lease_s

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members.values())

    def join(self, client: bytes, name: str) -> Member:
        """The member of this name, new or in a new incarnation.

        Raises:
            AccessDenied: another client has the name; MessageError: this client has another name, or none.
        """
        self._require_name(client, name)
        if (member := self.members.get(name)) is None:
            member = self.members[name] = Member(self._run, name, key_of(client))
        else:
            member.require_key(client)
            member.advance(Event.JOIN)
            member.rejoin()
        member.lease_until = time.monotonic() + self._lease_s
        self.ledger.add(events.Joined(name, member.incarnation))
        return member

    def of(self, client: bytes) -> Member | None:
        """The member that this client is."""
        key = key_of(client)
        return next((member for member in self if member.key == key), None)

    def renew(self, member: Member) -> None:
        """It works, or says that it is there; raises RunLost where it has left."""
        if member.advance(Event.WORK):
            self.ledger.add(events.Returned(member.name, member.incarnation))
        member.lease_until = time.monotonic() + self._lease_s

    def leave(self, member: Member) -> None:
        """Rounds no longer wait for it; what it has given to the open one counts."""
        member.advance(Event.LEAVE)
        member.forget()
        self.ledger.add(events.Left(member.name, member.incarnation))

    def active(self) -> set[str]:
        """The names of those that rounds wait for."""
        return {member.name for member in self if member.state is State.ACTIVE}

    def _lapse(self, now: float) -> None:
        """Let leases run out."""
        for member in self:
            if member.state is State.ACTIVE and member.lease_until <= now:
                member.advance(Event.LAPSE)
                member.forget()
                self.ledger.add(events.Lapsed(member.name, member.incarnation))

    def _require_name(self, client: bytes, name: str) -> None:
        if not name:
            raise MessageError(f"run {self._run.name} has members: say which one this is (member=, --member)")
        if (own := self.of(client)) is not None and own.name != name:
            raise MessageError(f"this client is member {own.name} of run {self._run.name}: give that name")
