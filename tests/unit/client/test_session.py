"""Whatever is done to the client's end of a session, the trunk ends up with the rows that were meant."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitlearn.client.session import ClientSession
from splitlearn.errors import SessionLost, UnsupportedCall
from splitlearn.vocabulary import Timings
from splitlearn.wire.messages import AnswerMessage, CloseMessage, ForkMessage, StepMessage

HIDDEN = 2


class RowsTransport:
    """Does what the protocol says with lists of numbers in place of keys and values."""

    def __init__(self) -> None:
        self.rows: dict[int, list[list[float]]] = {}
        self.masks: dict[int, list[list[bool]]] = {}
        self.steps: list[StepMessage] = []
        self.closed: list[int] = []
        self.fails = False

    def step(self, message: StepMessage) -> AnswerMessage:
        if self.fails:
            raise SessionLost("gone")
        self.steps.append(message)
        number = message.key.session
        if message.open is not None:
            self.rows[number] = [[] for _ in range(message.rows)]
            self.masks[number] = [[] for _ in range(message.rows)]
        chosen = message.select_rows or range(len(self.rows[number]))
        keep = message.keep_positions
        new, mask = message.activation_BTD[:, :, 0].tolist(), message.mask_columns_BT
        new_mask = [[True] * message.tokens] * message.rows if mask is None else mask.tolist()
        for held, added in ((self.rows, new), (self.masks, new_mask)):
            held[number] = [
                held[number][row][:keep] + extra for row, extra in zip(chosen, added, strict=True)
            ]
        return AnswerMessage(message.key, message.activation_BTD, Timings())

    def fork(self, message: ForkMessage) -> None:
        self.rows[message.into] = [list(row) for row in self.rows[message.session]]
        self.masks[message.into] = [list(row) for row in self.masks[message.session]]

    def close_session(self, message: CloseMessage) -> None:
        self.closed.append(message.session)


def values(rows: int, tokens: int, start: int = 0) -> torch.Tensor:
    numbers = torch.arange(start, start + rows * tokens, dtype=torch.float32).view(rows, tokens, 1)
    return numbers.expand(rows, tokens, HIDDEN)


def open_session(
    rows: int = 2, tokens: int = 3, mask: torch.Tensor | None = None
) -> tuple[ClientSession, RowsTransport]:
    transport = RowsTransport()
    session = ClientSession(transport)
    session.step(values(rows, tokens), mask, None, 1.0)
    return session, transport


def held(session: ClientSession, transport: RowsTransport) -> list[list[float]]:
    return transport.rows[session._number]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("crop"), st.integers(0, 4)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("fork"), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(ACTIONS)
def test_crops_selections_repeats_and_forks_in_any_order_reach_the_trunk(actions):
    session, transport = open_session()
    expected = values(2, 3)[:, :, 0].tolist()
    others = []
    count = 100
    for what, argument in [*actions, ("step", 1)]:
        rows, length = len(expected), len(expected[0])
        if what == "step":
            session.step(values(rows, argument, count), None, None, 1.0)
            new = values(rows, argument, count)[:, :, 0].tolist()
            expected = [row + more for row, more in zip(expected, new, strict=True)]
            count += rows * argument
            assert held(session, transport) == expected
        elif what == "crop":
            session.crop(min(argument, length))
            expected = [row[:argument] for row in expected]
        elif what == "select":
            chosen = [index % rows for index in argument]
            session.select(torch.tensor(chosen))
            expected = [expected[index] for index in chosen]
        elif what == "repeat" and rows * argument <= 16:
            session.repeat(argument)
            expected = [row for row in expected for _ in range(argument)]
        elif what == "fork":
            others.append((session.fork(), [list(row) for row in expected]))
        assert (session.rows, session.length) == (len(expected), len(expected[0]))
    for other, rows_then in others:
        other.step(values(len(rows_then), 1), None, None, 1.0)
        assert [row[:-1] for row in held(other, transport)] == rows_then


def test_crops_and_selections_cost_no_message_of_their_own():
    session, transport = open_session()
    session.crop(2)
    session.select(torch.tensor([1, 0]))
    assert len(transport.steps) == 1
    session.step(values(2, 1), None, None, 1.0)
    assert (transport.steps[1].keep_positions, transport.steps[1].select_rows) == (2, (1, 0))
    session.step(values(2, 1), None, None, 1.0)
    assert transport.steps[2].keep_positions is transport.steps[2].select_rows is None


def test_rows_that_stay_as_they_are_need_no_selection():
    session, transport = open_session()
    session.select(torch.tensor([1, 0]))
    session.select(torch.tensor([1, 0]))
    session.step(values(2, 1), None, None, 1.0)
    assert transport.steps[1].select_rows is None


def test_steps_are_numbered_and_acknowledged():
    session, transport = open_session()
    for _ in range(2):
        session.step(values(2, 1), None, None, 1.0)
    assert [step.key.step for step in transport.steps] == [1, 2, 3]
    assert [step.acked_through for step in transport.steps] == [0, 1, 2]
    assert [step.open is not None for step in transport.steps] == [True, False, False]


def test_a_step_that_failed_changes_nothing_and_may_be_tried_again():
    session, transport = open_session()
    session.crop(2)
    transport.fails = True
    with pytest.raises(SessionLost):
        session.step(values(2, 1), None, None, 1.0)
    transport.fails = False
    session.step(values(2, 1, 50), None, None, 1.0)
    assert held(session, transport) == [[0.0, 1.0, 50.0], [3.0, 4.0, 51.0]]
    assert transport.steps[1].key.step == 2


PADDED = torch.tensor([[0, 1, 1], [1, 1, 1]])


def grown(mask: torch.Tensor, columns: int = 1) -> torch.Tensor:
    return torch.cat([mask, torch.ones(len(mask), columns, dtype=mask.dtype)], 1)


def test_only_new_columns_of_a_mask_are_sent_and_only_if_they_pad():
    session, transport = open_session(mask=PADDED)
    assert transport.steps[0].mask_columns_BT.tolist() == PADDED.bool().tolist()
    session.step(values(2, 1), grown(PADDED), None, 1.0)
    assert transport.steps[1].mask_columns_BT is None
    session.step(values(2, 1), torch.cat([grown(PADDED), torch.tensor([[1], [0]])], 1), None, 1.0)
    assert transport.steps[2].mask_columns_BT.tolist() == [[True], [False]]
    assert transport.masks[session._number][1] == [True, True, True, True, False]


def test_a_mask_follows_its_rows_and_its_crop():
    session, transport = open_session(mask=PADDED)
    session.select(torch.tensor([1, 0]))
    session.crop(2)
    session.step(values(2, 1), grown(PADDED[[1, 0], :2]), None, 1.0)
    assert transport.masks[session._number] == [[True, True, True], [False, True, True]]


@pytest.mark.parametrize(
    "mask",
    [grown(1 - PADDED), grown(torch.ones_like(PADDED)), None, grown(PADDED, 3)],
    ids=["other columns", "no padding", "none", "too long"],
)
def test_a_mask_whose_old_columns_changed_is_refused(mask):
    session, _ = open_session(mask=PADDED)
    with pytest.raises(UnsupportedCall):
        session.step(values(2, 1), mask, None, 1.0)


def test_a_session_that_nobody_holds_is_closed():
    session, transport = open_session()
    number = session._number
    del session
    gc.collect()
    assert transport.closed == [number]


def test_a_session_that_never_opened_closes_nothing_and_forks_for_free():
    transport = RowsTransport()
    session = ClientSession(transport)
    assert not session.fork().is_open
    session.select(torch.tensor([0, 0]))
    del session
    gc.collect()
    assert transport.closed == []
