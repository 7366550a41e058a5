"""A layer on a graph's memory is to the library what it was; whoever changes it otherwise takes it out."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from splitlearn.client.leased_layer import Held, Lease, LeasedLayer

ROWS, HEADS, LENGTH, COLUMNS, SIZE = 2, 3, 5, 8, 4


def filled() -> DynamicLayer:
    generator = torch.Generator().manual_seed(0)
    layer = DynamicLayer()
    layer.update(*torch.randn(2, ROWS, HEADS, LENGTH, SIZE, generator=generator))
    return layer


def leased(held: Held | None = None) -> tuple[LeasedLayer, Lease]:
    room = torch.zeros(2, ROWS, HEADS, COLUMNS, SIZE)
    lease = Lease(held or {7: (room[0], room[1])}, LENGTH)
    layer = LeasedLayer(7, filled())
    layer.move_into(lease)
    return layer, lease


def same(one: DynamicLayer, other: DynamicLayer) -> bool:
    return torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


def test_what_the_graph_writes_is_in_the_layer_once_it_is_counted():
    layer, lease = leased()
    lease.held[7][0][:, :, LENGTH] = 9.0
    assert same(layer, filled())
    lease.length += 1
    assert layer.get_seq_length() == LENGTH + 1
    assert bool((layer.keys[:, :, -1] == 9.0).all())


CHANGES: dict[str, Callable[[DynamicLayer], object]] = {
    "crop": lambda layer: layer.crop(-2),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "update": lambda layer: layer.update(*torch.ones(2, ROWS, HEADS, 2, SIZE)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_change_gives_what_it_gives_any_layer_and_takes_it_out_of_the_graph(name):
    layer, lease = leased()
    expected = filled()
    for each in (layer, expected):
        CHANGES[name](each)
    assert same(layer, expected)
    assert layer.lease is None
    # The memory is given to another cache: this one must not notice.
    for tensor in lease.held[7]:
        tensor.fill_(-1.0)
    assert same(layer, expected)


def test_a_copy_lives_without_the_graph():
    layer, lease = leased()
    copied = copy.deepcopy(layer)
    for tensor in lease.held[7]:
        tensor.fill_(-1.0)
    assert type(copied) is DynamicLayer
    assert same(copied, filled())
    assert not same(layer, filled()), "control: the layer itself stands on that memory"


def test_a_layer_goes_back_into_a_graph_after_it_was_taken_out():
    layer, _ = leased()
    layer.crop(-2)
    _, lease = leased()
    lease.length = LENGTH - 2
    layer.move_into(lease)
    assert layer.lease is lease
    expected = filled()
    expected.crop(-2)
    assert same(layer, expected)
