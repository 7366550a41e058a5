"""A session's rows after any crop and any selection are the rows that were asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitlearn.engine.kv_cache import KvCache, LayerShape
from splitlearn.engine.session import Session
from splitlearn.errors import KvBudgetExceeded, MessageError, SessionTooLong
from splitlearn.vocabulary import Precision, StepKey
from splitlearn.wire.messages import StepMessage

TOKENS = 8


def kv_cache(slots: int = 12) -> KvCache:
    shape = LayerShape(1, 1, 1)
    return KvCache(
        [shape],
        budget_bytes=slots * TOKENS * 8,
        slot_tokens=TOKENS,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def session(kv: KvCache, rows: int, length: int = 3) -> Session:
    """Row r holds the number r + 1 in each of its tokens."""
    made = Session((b"client", 1), 0, Precision(), kv.take(rows), lease_until=0.0, length=length)
    for row, slot in enumerate(made.slots):
        kv.keys_SHLE[0][slot, :, :length] = row + 1
    return made


def message(rows: int, tokens: int = 1, **fields) -> StepMessage:
    return StepMessage(StepKey(session=1, step=1), torch.zeros(rows, tokens, 4), **fields)


def contents(kv: KvCache, made: Session) -> list[float]:
    return [kv.keys_SHLE[0][slot, 0, 0, 0].item() for slot in made.slots]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), max_size=4))
def test_selected_rows_are_those_that_were_named_however_often(rows, selections):
    kv = kv_cache(24)
    made = session(kv, rows)
    expected = [float(row + 1) for row in range(rows)]
    for selection in selections:
        chosen = [row % len(expected) for row in selection]
        made.prepare(message(len(chosen), select_rows=tuple(chosen)), kv)
        expected = [expected[row] for row in chosen]
        assert contents(kv, made) == expected
        assert len(set(made.slots)) == len(made.slots)
        assert kv.free_bytes == (kv.slots - len(made.slots)) * kv.slot_bytes


def test_a_beam_that_goes_on_as_it_is_keeps_its_slot():
    kv = kv_cache()
    made = session(kv, 3)
    before = made.slots
    made.prepare(message(3, select_rows=(1, 1, 2)), kv)
    assert made.slots[0] == before[1]
    assert made.slots[2] == before[2]
    assert made.slots[1] == before[0]


def test_rows_that_are_gone_leave_nothing_behind():
    kv = kv_cache()
    made = session(kv, 3)
    gone = made.slots[0]
    made.prepare(message(1, select_rows=(2,)), kv)
    assert not kv.keys_SHLE[0][gone].any()


def test_no_room_for_further_rows_changes_nothing():
    kv = kv_cache(slots=3)
    made = session(kv, 2)
    before = made.slots
    with pytest.raises(KvBudgetExceeded):
        made.prepare(message(4, select_rows=(0, 0, 1, 1)), kv)
    assert made.slots == before
    assert contents(kv, made) == [1.0, 2.0]


def test_a_crop_forgets_the_tokens_after_it():
    kv = kv_cache()
    made = session(kv, 1)
    made.prepare(message(1, keep_positions=1), kv)
    assert made.length == 1
    assert kv.keys_SHLE[0][made.slots[0], 0, :, 0].tolist() == [1.0] + [0.0] * 7


WRONG = {
    "another number of rows": (message(3), MessageError),
    "a row that is not there": (message(1, select_rows=(2,)), MessageError),
    "a crop beyond the end": (message(2, keep_positions=4), MessageError),
    "longer than a slot": (message(2, tokens=6), SessionTooLong),
    "a position beyond the model's": (message(2, positions_BT=torch.tensor([[7], [20]])), SessionTooLong),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_step_that_does_not_fit_is_refused(what):
    wrong, kind = WRONG[what]
    made = session(kv_cache(), 2)
    made.check(message(2), TOKENS, 16)
    with pytest.raises(kind):
        made.check(wrong, TOKENS, 16)


def test_a_crop_makes_room_for_more():
    made = session(kv_cache(), 2)
    made.check(message(2, tokens=7, keep_positions=1), TOKENS, 16)
