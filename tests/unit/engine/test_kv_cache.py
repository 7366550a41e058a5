"""Slots are taken, wiped and given back under one budget."""

import pytest
import torch
from torch.ops import aten
from torch.utils._python_dispatch import TorchDispatchMode

from splitlearn.engine.kv_cache import KvCache, LayerShape
from splitlearn.errors import KvBudgetExceeded, SettingError

SHAPES = [LayerShape(2, 4, 4), LayerShape(1, 3, 5)]
TOKEN_BYTES = (2 * 8 + 1 * 8) * 4


def cache(slots: int = 4, tokens: int = 6) -> KvCache:
    return KvCache(
        SHAPES,
        budget_bytes=slots * tokens * TOKEN_BYTES,
        slot_tokens=tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def fill(kv: KvCache, slot: int, value: float) -> None:
    for layer in (*kv.keys_SHLE, *kv.values_SHLE):
        layer[slot] = value


def is_zero(kv: KvCache, slot: int) -> bool:
    return not any(layer[slot].any() for layer in (*kv.keys_SHLE, *kv.values_SHLE))


def test_the_budget_is_filled_with_whole_slots():
    kv = cache(slots=4)
    held = sum(layer.nbytes for layer in (*kv.keys_SHLE, *kv.values_SHLE))
    assert kv.slots == 4
    assert kv.total_bytes == kv.free_bytes == held == 4 * 6 * TOKEN_BYTES


def test_a_budget_too_small_for_one_session_is_refused_with_the_figures():
    with pytest.raises(SettingError, match="--kv-budget"):
        KvCache(SHAPES, budget_bytes=10, slot_tokens=6, dtype=torch.float32, device=torch.device("cpu"))


def test_more_rows_than_there_are_slots_are_refused_with_the_figures():
    kv = cache(slots=4)
    kv.take(3)
    with pytest.raises(KvBudgetExceeded, match="2 rows") as refused:
        kv.take(2)
    slot = 6 * TOKEN_BYTES
    assert refused.value.facts == {"wanted_bytes": 2 * slot, "free_bytes": slot, "total_bytes": 4 * slot}
    assert refused.value.retryable
    kv.take(1)


def test_rows_get_neighbouring_slots_where_there_are_any():
    kv = cache(slots=6)
    first, second, third = kv.take(2), kv.take(1), kv.take(3)
    assert (first, second, third) == ((0, 1), (2,), (3, 4, 5))
    kv.give_back(first, 0)
    kv.give_back((3, 4), 0)
    assert kv.take(2) == (0, 1)
    assert kv.take(2) == (3, 4)


def test_scattered_slots_are_taken_where_there_are_no_neighbours():
    kv = cache(slots=4)
    kv.take(4)
    kv.give_back((0,), 0)
    kv.give_back((2,), 0)
    assert kv.take(2) == (0, 2)


def test_a_slot_that_is_given_back_holds_nothing_of_its_session():
    kv = cache()
    (slot,) = kv.take(1)
    fill(kv, slot, float("nan"))
    kv.hide((slot,), 0, torch.zeros(1, 6, dtype=torch.bool))
    kv.give_back((slot,), 6)
    assert is_zero(kv, slot)
    assert kv.visible_SL[slot].all()


def test_a_copy_takes_the_tokens_that_are_there_and_their_mask():
    kv = cache()
    source, target = kv.take(2)
    fill(kv, source, 7.0)
    kv.hide((source,), 0, torch.tensor([[False, True]]))
    kv.copy([(source, target)], 2)
    for layer in (*kv.keys_SHLE, *kv.values_SHLE):
        assert (layer[target, :, :2] == 7).all()
        assert not layer[target, :, 2:].any()
    assert kv.visible_SL[target].tolist() == kv.visible_SL[source].tolist()


def test_copies_of_several_slots_are_those_of_each_by_itself():
    kv = cache(slots=8)
    for slot in kv.take(8):
        fill(kv, slot, float(slot))
    kv.copy([(1, 6), (0, 4), (2, 7)], 6)
    assert [layer[:, 0, 0, 0].tolist() for layer in kv.keys_SHLE] == [[0, 1, 2, 3, 0, 5, 1, 2]] * 2


class Operations(TorchDispatchMode):
    """Counts what the device would be told to do."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.writes += function in (aten.zero_.default, aten.copy_.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [1, 28])
def test_neighbouring_slots_are_copied_and_wiped_in_one_operation_for_all_layers(layers):
    kv = KvCache(
        [LayerShape(2, 4, 4)] * layers,
        budget_bytes=16 * 6 * layers * 16 * 4,
        slot_tokens=6,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    slots = kv.take(16)
    with Operations() as counted:
        kv.wipe(slots[:8], 2, 6)
    assert counted.writes == 1
    with Operations() as counted:
        kv.copy(zip(slots[:8], slots[8:], strict=True), 4)
    assert counted.writes == 2, "keys and values, and the mask"


def test_wiped_tokens_are_forgotten_and_the_others_kept():
    kv = cache()
    (slot,) = kv.take(1)
    fill(kv, slot, 7.0)
    kv.wipe((slot,), 2, 6)
    assert (kv.keys_SHLE[0][slot, :, :2] == 7).all()
    assert not kv.keys_SHLE[0][slot, :, 2:].any()
