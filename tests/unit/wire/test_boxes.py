"""A session goes in boxes that are no larger than they may be, cover it once, and come in order."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitlearn.errors import MessageError
from splitlearn.wire.boxes import Box, BoxOrder, boxes_of


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 300),
)
def test_boxes_cover_all_once_within_their_size_and_in_order(rows, length, sizes, part_bytes):
    boxes = list(boxes_of(rows, length, sizes, part_bytes))
    covered = [
        (box.layer, row, position)
        for box in boxes
        for row in range(rows)[box.row_range]
        for position in range(length)[box.position_range]
    ]
    assert covered == list(itertools.product(range(len(sizes)), range(rows), range(length)))
    for box in boxes:
        assert box.rows * box.positions * sizes[box.layer] <= max(part_bytes, sizes[box.layer])
    order = BoxOrder(len(sizes), rows, length)
    for box in boxes:
        assert not order.is_complete
        order.take(box)
    assert order.is_complete


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 200),
    st.builds(
        Box, st.integers(0, 2), st.integers(0, 3), st.integers(0, 3), st.integers(0, 5), st.integers(0, 5)
    ),
)
def test_a_box_that_is_not_due_is_refused(taken, wrong):
    boxes = list(boxes_of(3, 4, [10, 10], 20))
    order = BoxOrder(2, 3, 4)
    for box in boxes[: taken % (len(boxes) + 1)]:
        order.take(box)
    done = sum(box.rows * box.positions for box in boxes[: taken % (len(boxes) + 1)])
    begins_at = (wrong.layer * 3 + wrong.first_row) * 4 + wrong.first_position
    in_row = wrong.first_row < 3 and wrong.first_position < 4
    is_box = wrong.rows == 1 or (wrong.positions == 4 and wrong.rows > 1)
    fits = wrong.first_row + wrong.rows <= 3 and 1 <= wrong.positions <= 4 - wrong.first_position
    if in_row and begins_at == done and is_box and fits and wrong.layer < 2:
        order.take(wrong)
    else:
        with pytest.raises(MessageError):
            order.take(wrong)
