"""Sessions that leave or arrive, a part at a time between others' steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from weakref import WeakKeyDictionary

import xxhash

from splitlearn.engine.kv_cache import KvCache
from splitlearn.engine.session import Session, SessionId
from splitlearn.engine.session_table import SessionTable
from splitlearn.engine.step_queue import StepQueue
from splitlearn.engine.trunk_state import AdapterVersion, TrunkState
from splitlearn.errors import AdapterError, MessageError, StepOutOfOrder
from splitlearn.vocabulary import Versions
from splitlearn.wire.boxes import Box, boxes_of
from splitlearn.wire.codecs import RawCodec
from splitlearn.wire.dtypes import dtype_name
from splitlearn.wire.host_memory import to_host
from splitlearn.wire.messages import SessionHead, SessionPart


class SessionMoves:
    """Called from any thread; each is done on the engine's, and what it raises is in its future.

    A session's id is its client's and its number: who does not have both cannot name it.
    """

    def __init__(
        self,
        queue: StepQueue,
        sessions: SessionTable,
        kv: KvCache,
        state: TrunkState,
        refuse_when_draining: Callable[[], None],
    ) -> None:
        self._queue = queue
        self._sessions = sessions
        self._kv = kv
        self._state = state
        self._refuse_when_draining = refuse_when_draining

    @property
    def layers(self) -> int:
        return len(self._kv.shapes)

    def boxes(self, head: SessionHead, part_bytes: int) -> Iterator[Box]:
        """What is to be read, in the order in which it is sent."""
        return boxes_of(head.rows, head.length, self._kv.position_bytes, part_bytes)

    def head(self, id: SessionId, incarnation: int = 0) -> Future[SessionHead]:
        """What the session is.

        Raises (in the future):
            SessionLost: it is not here; StepOutOfOrder: a step of it runs.
        """
        return self._queue.ask(lambda: self._head_of(self._resting(id, incarnation)))

    def read(self, id: SessionId, head: SessionHead, box: Box, incarnation: int = 0) -> Future[SessionPart]:
        """Keys and values of this box.

        Raises (in the future):
            SessionLost, StepOutOfOrder: the session is gone, or has gone on since.
        """

        def read() -> SessionPart:
            session = self._resting(id, incarnation)
            if session.next_step != head.next_step:
                raise StepOutOfOrder(
                    "the session went on while it was exported: let no other thread generate with it",
                    facts={"current_step": session.next_step},
                )
            slots = session.holding[box.row_range]
            keys_BHTE, values_BHTE = self._kv.read(box.layer, slots, box.position_range)
            visible_BT = None
            if box.layer == 0 and session.padded:
                visible_BT = to_host(self._kv.visible_SL[list(slots), box.position_range])
            return SessionPart(
                box.layer, box.first_row, box.first_position, keys_BHTE, values_BHTE, visible_BT
            )

        return self._queue.ask(read)

    def begin(self, id: SessionId, head: SessionHead) -> Future[None]:
        """Make room for a session that arrives.

        Raises (in the future):
            SettingError: it is of another dtype; AdapterError: its adapter is not here at its version.
            MessageError, SessionTooLong, KvBudgetExceeded, ResourceExhausted: it cannot be had here.
        """
        self._refuse_when_draining()

        def begin() -> None:
            self._state.require_precision(head.precision)
            adapter = self._sessions.adapter(id[0], head.adapter)
            if digest_of(adapter) != head.adapter_digest:
                raise AdapterError(
                    f"adapter {adapter.name!r} has other weights here than the session was generated with: "
                    "restore the same run, or load the same adapter"
                )
            self._sessions.begin_import(id, head, adapter, time.monotonic())

        return self._queue.ask(begin)

    def write(self, id: SessionId, part: SessionPart) -> Future[None]:
        """Put a part of an arriving session in its place.

        Raises (in the future):
            SessionLost: it was closed meanwhile; MessageError, FrameError: the part does not fit it.
        """

        def write() -> None:
            session = self._sessions.arriving(id, time.monotonic())
            rows, _, positions, _ = part.keys_BHTE.shape
            slots = session.slots[part.first_row : part.first_row + rows]
            if part.layer >= self.layers or part.first_position + positions > session.length:
                raise MessageError(f"a part of layer {part.layer} reaches over the session's edge")
            self._kv.write(part.layer, slots, part.first_position, part.keys_BHTE, part.values_BHTE)
            if part.visible_BT is not None:
                session.padded = True
                self._kv.hide(slots, part.first_position, part.visible_BT)

        return self._queue.ask(write)

    def finish(self, id: SessionId) -> Future[None]:
        """All parts are there: the session's client can go on with it."""

        def finish() -> None:
            self._sessions.arriving(id, time.monotonic()).is_arriving = False

        return self._queue.ask(finish)

    def abandon(self, id: SessionId) -> Future[None]:
        """Free what an import has taken."""
        return self._queue.ask(lambda: self._sessions.drop(self._sessions.arriving(id, time.monotonic())))

    def _resting(self, id: SessionId, incarnation: int) -> Session:
        session = self._sessions.find(id, incarnation)
        if session.running is not None:
            raise StepOutOfOrder(
                "a step of the session runs: export it once that is answered",
                facts={"current_step": session.next_step},
            )
        self._sessions.renew(session, time.monotonic())
        return session

    def _head_of(self, session: Session) -> SessionHead:
        adapter = session.adapter
        return SessionHead(
            rows=session.rows,
            length=session.length,
            next_step=session.next_step,
            adapter=Versions(adapter.name, adapter.number),
            adapter_digest=digest_of(adapter),
            follow=session.follow,
            precision=replace(session.precision, weights=dtype_name(self._kv.dtype)),
        )


def digest_of(adapter: AdapterVersion) -> int:
    """Tells an adapter's weights from others of the same name and version; 0 is no adapter.

    Worked out once a version: it reads all weights, on the engine's thread.
    """
    if not adapter.name:
        return 0
    if adapter not in _digests:
        _digests[adapter] = _digest_of_weights(adapter)
    return _digests[adapter]


_digests: WeakKeyDictionary[AdapterVersion, int] = WeakKeyDictionary()


def _digest_of_weights(adapter: AdapterVersion) -> int:
    total, raw = xxhash.xxh3_64(), RawCodec()
    for name, weight in sorted(adapter.weights.items()):
        total.update(f"{name} {dtype_name(weight.dtype)} {list(weight.shape)}\n".encode())
        total.update(raw.encode_view(to_host(weight)))
    return total.intdigest() or 1
