"""Which shape a batch is run in."""

import pytest
import torch

from splitlearn.engine.batch_plan import BatchPlan
from splitlearn.engine.graph_rows import GraphRows, GraphShape
from splitlearn.engine.kv_cache import KvCache, LayerShape

CPU = torch.device("cpu")


@pytest.fixture
def kv() -> KvCache:
    shape = LayerShape(heads=1, key_size=2, value_size=2)
    return KvCache(
        [shape],
        budget_bytes=16 * 1024 * 4 * shape.elements,
        slot_tokens=1024,
        dtype=torch.float32,
        device=CPU,
        spare=True,
    )


def plan(*slots: int, length: int = 7) -> BatchPlan:
    rows = len(slots)
    return BatchPlan((1,) * rows, (1,) * rows, slots, (length,) * rows, 1, (0,) * rows)


@pytest.mark.parametrize(
    ("slots", "length", "shape"),
    [
        ((0,), 7, GraphShape(1, 256, standing=True)),
        ((1,), 7, GraphShape(2, 256, standing=True)),
        ((2,), 7, GraphShape(1, 256, standing=False)),
        ((0, 3, 4), 7, GraphShape(8, 256, standing=True)),
        ((0, 9), 7, GraphShape(2, 256, standing=False)),
        (tuple(range(7)), 256, GraphShape(8, 512, standing=True)),
        (tuple(range(8, 16)), 7, GraphShape(8, 256, standing=False)),
        ((0,), 1023, GraphShape(1, 1024, standing=True)),
    ],
)
def test_the_shape_is_the_smallest_that_the_batch_fits_in(
    kv: KvCache, slots: tuple[int, ...], length: int, shape: GraphShape
) -> None:
    assert GraphShape.of(plan(*slots, length=length), kv, max_rows=8) == shape


@pytest.mark.parametrize("shape", [GraphShape(8, 256, standing=True), GraphShape(4, 256, standing=False)])
def test_rows_go_in_and_come_out_in_the_batchs_order(kv: KvCache, shape: GraphShape) -> None:
    rows = GraphRows(kv, shape, CPU)
    state_R1D = torch.arange(float(shape.rows))[:, None, None]
    rows.place(plan(5, 1, 3), None)
    rows.bring()
    out_R1D = rows.answers(rows.seated(state_R1D))
    assert out_R1D[:3, 0, 0].tolist() == [0.0, 1.0, 2.0]


def test_rows_that_are_left_over_write_where_nobody_looks(kv: KvCache) -> None:
    standing = GraphRows(kv, GraphShape(4, 256, standing=True), CPU)
    standing.place(plan(2), None)
    standing.bring()
    assert standing.column_R.tolist() == [1024, 1024, 7, 1024]
    gathered = GraphRows(kv, GraphShape(4, 256, standing=False), CPU)
    gathered.place(plan(9), None)
    gathered.bring()
    assert gathered.slot_R.tolist() == [9, kv.spare, kv.spare, kv.spare]


def test_every_shape_that_a_batch_may_have_is_listed(kv: KvCache) -> None:
    listed = list(GraphShape.every(kv, max_rows=6))
    assert len(set(listed)) == len(listed) == 2 * 4 * 3
    for rows in range(1, 7):
        for first in range(16 - rows):
            for length in (0, 255, 256, 1023):
                asked = plan(*range(first, first + rows), length=length)
                assert GraphShape.of(asked, kv, max_rows=6) in listed
