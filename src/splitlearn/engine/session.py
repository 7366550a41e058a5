"""One client's generation on the trunk: its slots, its length and its numbered steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from splitlearn.engine.account import Account, unlimited
from splitlearn.engine.kv_cache import KvCache
from splitlearn.engine.step import Step
from splitlearn.engine.trunk_state import BARE, AdapterVersion
from splitlearn.errors import MessageError, SessionTooLong, too_long_for_model
from splitlearn.vocabulary import Precision
from splitlearn.wire.messages import StepMessage

SessionId = tuple[bytes, int]
"""Its client's id and the number that the client gave it."""


@dataclass(slots=True, eq=False)
class Session:
    """Rows of equal length in slots of the KV cache; changed by the engine's thread alone.

    A fork has slots of its own from the start, so that it never lacks them later, but borrows its parent's
    until either of them writes where the other reads: its tokens are copied then, and only those it keeps.
    What a parent appends is no such write.
    """

    id: SessionId
    incarnation: int
    precision: Precision
    slots: tuple[int, ...]
    lease_until: float
    lease_s: float = 0.0
    adapter: AdapterVersion = BARE
    follow: bool = False
    length: int = 0
    padded: bool = False
    next_step: int = 1
    running: Step[StepMessage] | None = None
    is_arriving: bool = False
    """Whether it is being imported: it is there, but nobody can use it yet."""
    account: Account = field(default_factory=unlimited)
    """Its client's, which its slots are counted in."""
    lender: Session | None = None
    borrowers: list[Session] = field(default_factory=list)

    @property
    def holding(self) -> tuple[int, ...]:
        """The slots in which its tokens lie."""
        return self.slots if self.lender is None else self.lender.slots

    @property
    def rows(self) -> int:
        return len(self.slots)

    def check(self, message: StepMessage, slot_tokens: int, max_positions: int | None) -> None:
        """Whether the step fits this session; nothing is changed yet.

        Raises:
            MessageError: rows or lengths do not fit the session.
            SessionTooLong: the rows would outgrow the slots or the model's positions.
        """
        kept = self.length if message.keep_positions is None else message.keep_positions
        if kept > self.length:
            raise MessageError(f"keep_positions is {kept}, the session holds {self.length}")
        self._check_rows(message)
        require_room(message, kept, slot_tokens, max_positions)

    def _check_rows(self, message: StepMessage) -> None:
        if message.select_rows is None:
            if message.rows != self.rows:
                raise MessageError(f"a step of {message.rows} rows for a session of {self.rows}")
        elif max(message.select_rows) >= self.rows:
            raise MessageError(f"select_rows names row {max(message.select_rows)} of {self.rows}")

    def prepare(self, message: StepMessage, kv: KvCache) -> None:
        """Crop and select as the step says, and note which of its new columns count.

        Raises:
            KvBudgetExceeded, ResourceExhausted: there is no room for further rows; nothing was changed.
        """
        keep = self.length if message.keep_positions is None else message.keep_positions
        for borrower in self.borrowers.copy():
            if message.select_rows is not None or borrower.length > keep:
                borrower._settle(kv, None, borrower.length)
        if self.lender is not None:
            self._settle(kv, message.select_rows, keep)
        elif message.select_rows is not None:
            self._select(message.select_rows, kv)
        if keep < self.length:
            kv.wipe(self.slots, keep, self.length)
            self.length = keep
        if message.mask_columns_BT is not None:
            self.padded = True
            kv.hide(self.slots, self.length, message.mask_columns_BT)

    def borrow(self, parent: Session) -> None:
        """Stand where the parent stands, in whichever slots its tokens lie."""
        self.length, self.padded = parent.length, parent.padded
        self.lender = parent.lender or parent
        self.lender.borrowers.append(self)

    def free(self, kv: KvCache) -> None:
        """Give the slots back; those that others borrow go to the longest of these."""
        # A step that failed may have written beyond the session's length.
        written = self.length + (self.running.message.tokens if self.running else 0)
        written = min(written, kv.slot_tokens)
        if self.lender is not None:
            self.lender.borrowers.remove(self)
            written = 0
        elif self.borrowers:
            heir = max(self.borrowers, key=lambda borrower: borrower.length)
            self.slots, heir.slots = heir.slots, self.slots
            kv.wipe(heir.slots, heir.length, written)
            heir.lender, heir.borrowers = None, [each for each in self.borrowers if each is not heir]
            for borrower in heir.borrowers:
                borrower.lender = heir
            written = 0
        self._give_back(kv, self.slots, written)

    def _settle(self, kv: KvCache, rows: Sequence[int] | None, length: int) -> None:
        """Copy so much of what is borrowed into its own slots: these rows in this order, all by default."""
        lender = self.lender
        assert lender is not None
        kept = lender.slots if rows is None else [lender.slots[row] for row in rows]
        if len(kept) > len(self.slots):
            self.slots += self._take(kv, len(kept) - len(self.slots))
        own, unused = self.slots[: len(kept)], self.slots[len(kept) :]
        kv.copy(zip(kept, own, strict=True), length)
        self._give_back(kv, unused, 0)
        lender.borrowers.remove(self)
        self.lender, self.slots, self.length = None, own, length

    def _select(self, rows: Sequence[int], kv: KvCache) -> None:
        """Make `rows` the session's rows, in this order.

        A row keeps its slot at its first mention, so that beams which go on as they are cost
        nothing; further mentions are copied into the slots of rows that are gone, or into new ones.
        """
        first_place: dict[int, int] = {}
        copies = [place for place, row in enumerate(rows) if first_place.setdefault(row, place) != place]
        spare = [slot for row, slot in enumerate(self.slots) if row not in first_place]
        if len(copies) > len(spare):
            spare.extend(self._take(kv, len(copies) - len(spare)))
        slots = [self.slots[row] for row in rows]
        kv.copy([(slots[place], slot) for place, slot in zip(copies, spare, strict=False)], self.length)
        for place, slot in zip(copies, spare, strict=False):
            slots[place] = slot
        if unused := spare[len(copies) :]:
            self._give_back(kv, unused, self.length)
        self.slots = tuple(slots)

    def _take(self, kv: KvCache, rows: int) -> tuple[int, ...]:
        return taken(kv, rows, self.account)

    def _give_back(self, kv: KvCache, slots: Sequence[int], length: int) -> None:
        kv.give_back(slots, length)
        self.account.give_back(len(slots) * kv.slot_bytes)


def taken(kv: KvCache, rows: int, account: Account) -> tuple[int, ...]:
    """Slots for so many rows.

    Raises:
        ResourceExhausted: they are more than the client's quota allows; KvBudgetExceeded: than are free.
    """
    account.require(rows * kv.slot_bytes, f"a KV cache of {rows} rows")
    slots = kv.take(rows)
    account.take(rows * kv.slot_bytes, "a KV cache")
    return slots


def require_room(message: StepMessage, kept: int, slot_tokens: int, max_positions: int | None) -> None:
    """Raises SessionTooLong where rows of `kept` tokens and the step's fit neither a slot nor the model."""
    length = kept + message.tokens
    positions_BT = message.positions_BT
    require_length(
        length,
        slot_tokens,
        max_positions,
        length if positions_BT is None else int(positions_BT.max()) + 1,
    )


def require_length(length: int, slot_tokens: int, max_positions: int | None, positions: int) -> None:
    """Raises SessionTooLong where so many tokens do not fit a slot, or so many positions the model."""
    if max_positions is not None and positions > max_positions:
        raise too_long_for_model(positions, max_positions)
    if length > slot_tokens:
        raise SessionTooLong(
            f"the text would be {length:,} tokens long, a session of this server holds {slot_tokens:,}: "
            "shorten it, or start the server with a larger --session-tokens",
            facts={"tokens": length, "session_tokens": slot_tokens},
        )
