"""The client's end of a session on the trunk: what the server holds, and what the next step must change."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from splitlearn.client.transport import Transport
from splitlearn.errors import StepOutOfOrder, TrunkUnreachable, UnsupportedCall
from splitlearn.vocabulary import StepKey
from splitlearn.wire.messages import AnswerMessage, CloseMessage, ForkMessage, OpenSession, StepMessage
from splitlearn.wire.sessions import MovedSession

# B rows   T new tokens   L tokens held   D hidden

SESSION_BITS = 32


class ClientSession:
    """Crops and row changes wait here and ride in the next step, so that they cost no round trip.

    Opened by its first step, closed when nothing refers to it any more.
    """

    def __init__(self, transport: Transport, opening: OpenSession | None = None) -> None:
        self._transport = transport
        self.opening = opening or OpenSession()
        self._number = 0
        self._rows = 0
        self._step = 0
        self._acked = 0
        self._crop_to: int | None = None
        self._select: Tensor | None = None
        self._mask_BL: Tensor | None = None
        self.length = 0

    @property
    def is_open(self) -> bool:
        return self._number != 0

    def step(
        self, activation_BTD: Tensor, mask_BL: Tensor | None, positions_BT: Tensor | None, deadline_s: float
    ) -> AnswerMessage:
        """Send the new tokens of every row.

        If this raises, the session is as it was; the bottom's cache has the tokens already, so that only
        the same step may be asked again, and never another one in its place.

        Args:
            activation_BTD: the new tokens' activations.
            mask_BL: the whole 2-D mask, old and new columns; None where nothing is padded.
            positions_BT: the new tokens' positions; None where they go on from the length.
            deadline_s: how long to wait for the answer.

        Raises:
            UnsupportedCall: the mask's old columns are not those of the steps before.
        """
        rows, tokens = activation_BTD.shape[:2]
        held_BL = self._held_mask(rows)
        new_BT = self._new_columns(mask_BL, held_BL, tokens)
        number = self._number or self._new_number()
        with self._closing_if_lost(number):
            answer = self._transport.step(
                StepMessage(
                    key=StepKey(session=number, step=self._step + 1),
                    activation_BTD=activation_BTD,
                    open=None if self.is_open else self.opening,
                    mask_columns_BT=new_BT,
                    positions_BT=positions_BT,
                    keep_positions=self._crop_to,
                    select_rows=None if self._select is None else tuple(self._select.tolist()),
                    acked_through=self._acked,
                    deadline_s=deadline_s,
                )
            )
        self._done(answer, rows, tokens, held_BL, new_BT)
        return answer

    def crop(self, keep: int) -> None:
        """Keep the first `keep` tokens of each row, from the next step on."""
        if keep < self.length:
            self._crop_to = keep if self._crop_to is None else min(keep, self._crop_to)
            self.length = keep

    def select(self, rows: Tensor) -> None:
        """Make these rows (indices of the present ones) the session's rows, from the next step on."""
        if not self.is_open:
            return
        rows = rows.cpu().long()
        selected = rows if self._select is None else self._select[rows]
        unchanged = selected.tolist() == list(range(self._rows))
        self._select = None if unchanged else selected

    def repeat(self, times: int) -> None:
        """Make each row stand `times` times, one after another."""
        self.select(torch.arange(self.rows).repeat_interleave(times))

    @property
    def rows(self) -> int:
        """Rows once what waits is done."""
        return self._rows if self._select is None else len(self._select)

    def fork(self) -> ClientSession:
        """A session of its own that stands where this one stands."""
        child = ClientSession(self._transport, self.opening)
        if not self.is_open:
            return child
        number = child._new_number()
        with child._closing_if_lost(number):
            self._transport.fork(ForkMessage(session=self._number, into=number, at_step=self._step))
        child._become(number)
        child._rows, child.length = self._rows, self.length
        child._crop_to, child._select, child._mask_BL = self._crop_to, self._select, self._mask_BL
        return child

    def export(self, layers: int) -> MovedSession:
        """All that the server holds of the session, as it is once what waits is done.

        Raises:
            SessionLost: the server no longer has it; StepOutOfOrder: somebody else goes on with it.
        """
        moved = self._transport.export_session(self._number, layers)
        head = moved.head
        if head.next_step != self._step + 1 or head.rows != self._rows or head.length < self.length:
            raise StepOutOfOrder(
                f"the server exported the session at step {head.next_step}, this side stands at "
                f"{self._step + 1}: let no other thread generate with it meanwhile"
            )
        rows = torch.arange(head.rows) if self._select is None else self._select
        return replace(
            moved,
            head=replace(head, rows=len(rows), length=self.length),
            layers=tuple(
                (keys[rows, :, : self.length], values[rows, :, : self.length])
                for keys, values in moved.layers
            ),
            visible_BL=moved.visible_BL[rows, : self.length],
        )

    @classmethod
    def imported(cls, transport: Transport, moved: MovedSession) -> ClientSession:
        """A session that goes on where this one was exported.

        Raises:
            ModelMismatch, SplitMismatch, SettingError, AdapterError: it was exported from another trunk.
            SessionTooLong, KvBudgetExceeded, ResourceExhausted, TrunkDraining: there is no room for it.
        """
        head = moved.head
        session = cls(transport, OpenSession(head.adapter, head.follow, head.precision))
        number = session._new_number()
        with session._closing_if_lost(number):
            transport.import_session(number, moved)
        session._become(number)
        session._rows, session.length = head.rows, head.length
        session._mask_BL = None if bool(moved.visible_BL.all()) else moved.visible_BL
        return session

    @contextmanager
    def _closing_if_lost(self, number: int) -> Iterator[None]:
        """Close a session whose opening raised: the server may have opened it all the same, later."""
        try:
            yield
        except BaseException as error:
            if not self.is_open:
                self._transport.close_session(CloseMessage(number))
            if isinstance(error, TrunkUnreachable):
                raise error.advised("Then generate again from the prompt") from None
            raise

    def _new_number(self) -> int:
        return secrets.randbits(SESSION_BITS) | 1

    def _become(self, number: int) -> None:
        self._number = number
        # The garbage collector must not wait for the network: this only puts a message in line.
        weakref.finalize(self, self._transport.close_session, CloseMessage(number)).atexit = False

    def _done(
        self, answer: AnswerMessage, rows: int, tokens: int, held_BL: Tensor | None, new_BT: Tensor | None
    ) -> None:
        if not self.is_open:
            self._become(answer.key.session)
        self._mask_BL = _joined(held_BL, new_BT, rows, self.length, tokens)
        self._step = self._acked = answer.key.step
        self._rows, self.length = rows, self.length + tokens
        self._crop_to = self._select = None

    def _held_mask(self, rows: int) -> Tensor | None:
        """The mask of the tokens held, after what waits is done; None where nothing is padded."""
        held_BL = self._mask_BL
        if held_BL is None:
            return None
        if self._select is not None:
            held_BL = held_BL[self._select]
        return held_BL[:, : self.length]

    def _new_columns(self, mask_BL: Tensor | None, held_BL: Tensor | None, tokens: int) -> Tensor | None:
        """What the server does not know of the mask yet; None where all new columns count."""
        if mask_BL is None or bool(mask_BL.all()):
            if held_BL is not None and not bool(held_BL.all()):
                raise UnsupportedCall(_CHANGED_MASK)
            return None
        mask_BL = mask_BL.cpu().bool()
        if mask_BL.shape[1] != self.length + tokens:
            raise UnsupportedCall(
                f"the attention mask has {mask_BL.shape[1]} columns for {self.length} tokens held "
                f"and {tokens} new ones: pass the mask of the whole text"
            )
        old_BL = mask_BL[:, : self.length]
        if not bool(old_BL.all() if held_BL is None else torch.equal(old_BL, held_BL)):
            raise UnsupportedCall(_CHANGED_MASK)
        new_BT = mask_BL[:, self.length :]
        return None if bool(new_BT.all()) else new_BT


_CHANGED_MASK = (
    "the attention mask of tokens that the session already holds has changed: "
    "start again without past_key_values, or keep the mask as it was"
)


def _joined(
    held_BL: Tensor | None, new_BT: Tensor | None, rows: int, length: int, tokens: int
) -> Tensor | None:
    if held_BL is None and new_BT is None:
        return None
    ones = torch.ones(rows, length if held_BL is None else tokens, dtype=torch.bool)
    return torch.cat([ones if held_BL is None else held_BL, ones if new_BT is None else new_BT], dim=1)
