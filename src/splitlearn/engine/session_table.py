"""All sessions of the trunk: opened, found, forked, closed, expired."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from splitlearn.config import SessionConfig
from splitlearn.engine.account import Accounts
from splitlearn.engine.answer_window import AnswerWindow
from splitlearn.engine.kv_cache import KvCache
from splitlearn.engine.session import Session, SessionId, require_length, require_room, taken
from splitlearn.engine.step import Step
from splitlearn.engine.trunk_state import BARE, AdapterVersion
from splitlearn.errors import (
    AdapterError,
    MessageError,
    ResourceExhausted,
    SessionExpired,
    SessionLost,
    StepOutOfOrder,
)
from splitlearn.vocabulary import Precision, Versions
from splitlearn.wire.messages import (
    AnswerMessage,
    CloseMessage,
    ForkMessage,
    OpenSession,
    SessionHead,
    StepMessage,
)

REMEMBERED_EXPIRIES = 4096


def _no_adapter(client: bytes, name: str) -> AdapterVersion:
    raise AdapterError(f"this server has no adapter {name!r}; leave it out")


class SessionTable:
    """Belongs to the engine's thread. A session is its client's own: the client's id is part of its name."""

    def __init__(
        self,
        kv: KvCache,
        config: SessionConfig,
        max_positions: int | None,
        adapter_named: Callable[[bytes, str], AdapterVersion] = _no_adapter,
        accounts: Accounts | None = None,
    ) -> None:
        self._kv = kv
        self._adapter_named = adapter_named
        self._accounts = accounts or Accounts()
        self._config = config
        self._max_positions = max_positions
        self._answers = AnswerWindow(config.answer_window, config.answer_window_bytes)
        self._sessions: dict[SessionId, Session] = {}
        self._expired: OrderedDict[SessionId, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def adapters(self) -> Iterator[AdapterVersion]:
        """What each session generates with."""
        return (session.adapter for session in self._sessions.values())

    def enter(self, client: bytes, message: StepMessage, now: float) -> Session:
        """The session that this step belongs to, opened if the step says so, its lease renewed.

        Raises:
            SessionLost, SessionExpired: it is not here; MessageError, AdapterError: it cannot be opened so;
            SessionTooLong, KvBudgetExceeded, ResourceExhausted: there is no room for it.
        """
        id = (client, message.key.session)
        if message.open is not None and not self._is_open(id, message.key.incarnation):
            session = self._open_for(id, message, message.open, now)
        else:
            session = self.find(id, message.key.incarnation)
        self.renew(session, now)
        self._answers.release(id, message.acked_through)
        if session.follow and session.running is None:
            session.adapter = self._adapter_named(client, session.adapter.name)
        return session

    def kept_answer(self, session: Session, step: int) -> AnswerMessage | None:
        """The answer to a step that was done already; None where the step is the next one.

        Raises:
            StepOutOfOrder: the step is neither kept nor the next one.
        """
        if step == session.next_step:
            return None
        if kept := self._answers.get(session.id, step):
            return kept
        why = "its answer is no longer kept" if step < session.next_step else "it skips steps"
        raise StepOutOfOrder(
            f"step {step} cannot be done: {why}; the next is step {session.next_step}",
            facts={"current_step": session.next_step},
        )

    def adapter(self, client: bytes, wanted: Versions) -> AdapterVersion:
        """What a session of this client generates with; version 0 is the newest.

        Raises:
            AdapterError: the client has no such adapter, or not at this version any more.
        """
        if not wanted.adapter:
            return BARE
        found = self._adapter_named(client, wanted.adapter)
        if wanted.version and wanted.version != found.number:
            raise AdapterError(
                f"adapter {wanted.adapter!r} is at version {found.number}, not {wanted.version}: "
                "versions that no session holds are gone"
            )
        return found

    def check(self, session: Session, message: StepMessage) -> None:
        """Raises MessageError or SessionTooLong where the step does not fit; nothing is changed."""
        session.check(message, self._kv.slot_tokens, self._max_positions)

    def advance(self, session: Session, tokens: int, answer: AnswerMessage, now: float) -> None:
        """The session's next step is done: its answer is kept before it leaves, and its lease begins anew."""
        session.lease_until = now + session.lease_s
        self._answers.keep(session.id, session.next_step, answer)
        session.length += tokens
        session.next_step += 1
        session.running = None

    def find(self, id: SessionId, incarnation: int) -> Session:
        """Raises SessionLost, or SessionExpired where that is why it is gone."""
        if id in self._expired:
            raise SessionExpired(
                f"session {id[1]} was idle for over {self._config.lease_s:g} s and was closed: "
                "generate again from the prompt, or start the server with a longer --lease"
            )
        if not self._is_open(id, incarnation):
            raise SessionLost(
                f"session {id[1]} is not held here (it was closed, or the server restarted): "
                "generate again from the prompt"
            )
        return self._sessions[id]

    def fork(self, client: bytes, message: ForkMessage, now: float) -> None:
        """Another session that stands as this one does, under the new name.

        Raises:
            SessionLost: there is no such session; StepOutOfOrder: it is elsewhere than the client thinks;
            MessageError: the new name is taken; KvBudgetExceeded, ResourceExhausted: no room.
        """
        parent = self.find((client, message.session), message.incarnation)
        if message.at_step != parent.next_step - 1 or parent.running is not None:
            raise StepOutOfOrder(
                f"a fork after step {message.at_step} of a session that stands at step {parent.next_step}",
                facts={"current_step": parent.next_step},
            )
        id = (client, message.into)
        if id in self._sessions:
            raise MessageError(f"session {message.into} is open already: a fork needs a name of its own")
        child = self._open(id, message.incarnation, parent.rows, parent.precision, now)
        child.adapter, child.follow = parent.adapter, parent.follow
        child.borrow(parent)

    def begin_import(self, id: SessionId, head: SessionHead, adapter: AdapterVersion, now: float) -> None:
        """A session with room for what will come; nobody can use it before `finish_import`.

        Raises:
            MessageError: its name is taken; SessionTooLong, KvBudgetExceeded, ResourceExhausted: no room.
        """
        if id in self._sessions or not id[1]:
            raise MessageError(f"session {id[1]} is open already: an import needs a number of its own")
        require_length(head.length, self._kv.slot_tokens, self._max_positions, head.length)
        session = self._open(id, 0, head.rows, head.precision, now)
        session.adapter, session.follow = adapter, head.follow
        session.length, session.is_arriving = head.length, True

    def arriving(self, id: SessionId, now: float) -> Session:
        """Raises SessionLost where no such session is being imported any more."""
        session = self._sessions.get(id)
        if session is None or not session.is_arriving:
            raise SessionLost(f"session {id[1]} was closed while it was imported: import it again")
        self.renew(session, now)
        return session

    def renew(self, session: Session, now: float) -> None:
        """Its client is there: its lease begins anew."""
        session.lease_s = self._config.lease_s
        session.lease_until = now + session.lease_s

    def close(self, client: bytes, message: CloseMessage) -> None:
        """Free the session's slots; closing what is not there is no error."""
        session = self._sessions.get((client, message.session))
        if session is not None and session.incarnation == message.incarnation:
            self.drop(session)

    def drop(self, session: Session) -> None:
        """Free all that the session holds, whatever state it is in."""
        del self._sessions[session.id]
        self._answers.forget(session.id)
        session.free(self._kv)
        session.account.close_session()
        session.running = None

    def let_go(self, session: Session, step: Step[StepMessage], *, is_underway: bool = False) -> None:
        """The session's step is not run (to its end). What it was to open is not kept for a client that left.

        A session that holds a part of the step is lost: it stands neither before the step nor after it.
        """
        if session.running is not step:
            return
        if is_underway or (session.length == 0 and session.next_step == 1):
            self.drop(session)
        session.running = None

    def expire(self, now: float) -> int:
        """Close the sessions whose lease ran out while nothing of theirs waited; how many they were."""
        late = [s for s in self._sessions.values() if s.lease_until < now and s.running is None]
        for session in late:
            self.drop(session)
            self._expired[session.id] = None
        while len(self._expired) > REMEMBERED_EXPIRIES:
            self._expired.popitem(last=False)
        return len(late)

    def shorten_leases(self, client: bytes, now: float) -> None:
        """Nobody of this client is connected: its sessions wait a short while for it to come back."""
        until = now + self._config.orphan_lease_s
        for session in self._sessions.values():
            if session.id[0] == client:
                session.lease_until = min(session.lease_until, until)
                # A step of its that still runs does not make the while a long one.
                session.lease_s = min(session.lease_s, self._config.orphan_lease_s)

    def _is_open(self, id: SessionId, incarnation: int) -> bool:
        session = self._sessions.get(id)
        return session is not None and session.incarnation == incarnation and not session.is_arriving

    def _open_for(self, id: SessionId, message: StepMessage, opening: OpenSession, now: float) -> Session:
        if not id[1] or message.key.step != 1:
            raise MessageError("a session opens with a number of its own and its step 1")
        if message.keep_positions or message.select_rows is not None:
            raise MessageError("a session that opens has nothing to keep or to select")
        adapter = self.adapter(id[0], opening.adapter)
        require_room(message, 0, self._kv.slot_tokens, self._max_positions)
        if (older := self._sessions.get(id)) is not None:
            self._fence(older, message.key.incarnation)
        session = self._open(id, message.key.incarnation, message.rows, opening.precision, now)
        session.adapter, session.follow = adapter, opening.follow
        return session

    def _fence(self, older: Session, incarnation: int) -> None:
        """A newer incarnation takes the name over; an older one is turned away."""
        if incarnation < older.incarnation or older.running is not None:
            raise SessionLost(
                f"session {older.id[1]} is open as incarnation {older.incarnation} and cannot be opened as "
                f"{incarnation} now: use a session number of its own"
            )
        self.drop(older)

    def _open(self, id: SessionId, incarnation: int, rows: int, precision: Precision, now: float) -> Session:
        if len(self._sessions) >= self._config.max_sessions:
            raise ResourceExhausted(
                f"{len(self._sessions)} sessions are open, this server allows {self._config.max_sessions}: "
                "wait for others to end",
                facts={"sessions": len(self._sessions), "max_sessions": self._config.max_sessions},
            )
        account = self._accounts.of(id[0])
        account.open_session()
        try:
            slots = taken(self._kv, rows, account)
        except ResourceExhausted:
            account.close_session()
            raise
        lease_until = now + self._config.lease_s
        session = Session(id, incarnation, precision, slots, lease_until, account=account)
        self._sessions[id] = session
        self._expired.pop(id, None)
        return session
