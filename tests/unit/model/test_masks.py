from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import causal_mask_function, sdpa_mask

from splitlearn.errors import UnsupportedModel
from splitlearn.model.families import family_of
from splitlearn.model.masks import SLOTS, ragged, slot_mask, with_slot_masks
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.testing.tiny import PROVEN, VARIANTS, tiny_config

# B rows   S slots   T new tokens   K columns   H heads   D hidden   E head size

BATCHED = [name for name in (*PROVEN, *VARIANTS) if family_of(tiny_config(name)).batched]
SLOT_COUNT, LONGEST = 4, 24


class SlotLayer(CacheLayerMixin):
    """Keys and values in fixed slots, written at each row's own positions."""

    is_sliding = False
    is_compileable = False

    def __init__(self, batch: SimpleNamespace) -> None:
        super().__init__()
        self.batch = batch

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys_SHKE = key_states.new_zeros(SLOT_COUNT, key_states.shape[1], LONGEST, key_states.shape[3])
        self.values_SHKE = key_states.new_zeros(
            SLOT_COUNT, value_states.shape[1], LONGEST, value_states.shape[3]
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows_B, positions_BT = self.batch.rows_B, self.batch.positions_BT
        self.keys_SHKE[rows_B[:, None], :, positions_BT] = key_states.transpose(1, 2)
        self.values_SHKE[rows_B[:, None], :, positions_BT] = value_states.transpose(1, 2)
        return self.keys_SHKE[rows_B], self.values_SHKE[rows_B]

    def get_seq_length(self, *args: Any) -> int:
        return 0

    def get_max_length(self) -> int:
        return LONGEST

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        return LONGEST, 0


class Slots:
    """Runs rows of different length through a trunk, as an engine would."""

    def __init__(self, trunk: TrunkSegment) -> None:
        self.trunk = trunk
        self.batch = SimpleNamespace()
        self.cache = Cache(layers=[SlotLayer(self.batch) for _ in range(trunk.num_layers)])

    def run(
        self, hidden_BTD: Tensor, rows: list[int], starts: list[int], key_mask_BK: Tensor | None = None
    ) -> Tensor:
        columns_BT = torch.tensor(starts)[:, None] + torch.arange(hidden_BTD.shape[1])
        columns_BT = columns_BT.to(hidden_BTD.device)
        self.batch.rows_B, self.batch.positions_BT = torch.tensor(rows), columns_BT
        padding_B1 = 0 if key_mask_BK is None else (~key_mask_BK).sum(dim=1, keepdim=True)
        positions_BT = (columns_BT - padding_B1).clamp_min(0)
        with ragged(columns_BT, key_mask_BK):
            return self.trunk(hidden_BTD, position_ids=positions_BT, past_key_values=self.cache)


def _alone(trunk: TrunkSegment, prompt: Tensor, new: Tensor, padding: int = 0) -> Tensor:
    cache = DynamicCache(config=trunk.config)
    answers = []
    for state_BTD in (prompt, *new.split(1, dim=1)):
        start = cache.get_seq_length()
        length = start + state_BTD.shape[1]
        columns = torch.arange(length, device=trunk.device)
        answers.append(
            trunk(
                state_BTD,
                attention_mask=(columns >= padding).long()[None] if padding else None,
                position_ids=(columns[start:] - padding).clamp_min(0)[None],
                past_key_values=cache,
            )
        )
    return torch.cat(answers, dim=1)


def _worst(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _trunk(family: str, attention: str | None = None) -> TrunkSegment:
    torch.manual_seed(0)
    how = {"attn_implementation": attention} if attention else {}
    whole = AutoModelForCausalLM.from_config(tiny_config(family), **how).eval()
    return TrunkSegment.of_whole(whole, SplitPlan(6, 2, 2))


@torch.inference_mode()
@pytest.mark.parametrize("family", BATCHED)
def test_rows_of_different_length_in_one_batch_are_each_session_alone(family: str):
    _check_ragged(_trunk(family))


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon", "deepseek_v3"])
def test_so_they_are_with_eager_attention(family: str):
    trunk = _trunk(family, "eager")
    assert trunk.attention == "eager"
    _check_ragged(trunk)


@torch.inference_mode()
def test_a_family_that_is_kept_from_batches_would_be_wrong_in_one():
    with pytest.raises(AssertionError):
        _check_ragged(_trunk("phi3(longrope)"))


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_so_they_are_on_a_gpu(family: str):
    _check_ragged(_trunk(family).to("cuda"))


def _check_ragged(trunk: TrunkSegment) -> None:
    lengths, new_tokens = [3, 13], 4
    states = [torch.randn(1, length + new_tokens, 32, device=trunk.device) for length in lengths]
    alone = [
        _alone(trunk, *state.tensor_split([length], dim=1))
        for state, length in zip(states, lengths, strict=True)
    ]
    slots = Slots(trunk)
    for row, length in enumerate(lengths):
        ours = slots.run(states[row][:, :length], [row], [0])
        assert _worst(ours, alone[row][:, :length]) <= 1e-5
    for step in range(new_tokens):
        ends = [length + step for length in lengths]
        batch = torch.cat([state[:, end : end + 1] for state, end in zip(states, ends, strict=True)])
        ours = slots.run(batch, [0, 1], ends)
        theirs = torch.cat([answer[:, end : end + 1] for answer, end in zip(alone, ends, strict=True)])
        assert _worst(ours, theirs) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_oss"])
def test_a_left_padded_row_may_be_one_of_them(family: str):
    trunk, padding = _trunk(family), 3
    padded, other = torch.randn(1, 12, 32), torch.randn(1, 6, 32)
    padded_alone = _alone(trunk, padded[:, :10], padded[:, 10:], padding)
    other_alone = _alone(trunk, other[:, :4], other[:, 4:])
    key_mask = torch.ones(2, LONGEST, dtype=torch.bool)
    key_mask[0, :padding] = False
    slots = Slots(trunk)
    slots.run(padded[:, :10], [0], [0], key_mask[:1])
    slots.run(other[:, :4], [1], [0])
    ours = slots.run(torch.cat([padded[:, 10:], other[:, 4:]]), [0, 1], [10, 4], key_mask)
    assert _worst(ours[:1], padded_alone[:, 10:]) <= 1e-5
    assert _worst(ours[1:], other_alone[:, 4:]) <= 1e-5


@torch.inference_mode()
def test_rows_at_the_wrong_positions_give_something_else():
    """The equality above needs the positions that it is given."""
    trunk = _trunk("llama")
    states = torch.randn(2, 5, 32)
    slots, wrong = Slots(trunk), Slots(trunk)
    right = slots.run(states, [0, 1], [0, 0])
    assert _worst(wrong.run(states, [0, 1], [0, 7]), right) > 1e-3


ASKED = {
    "batch_size": 2,
    "q_length": 2,
    "kv_length": 4,
    "q_offset": 2,
    "kv_offset": 0,
    "mask_function": causal_mask_function,
    "attention_mask": None,
    "allow_is_causal_skip": True,
    "dtype": torch.float32,
    "use_vmap": False,
    "device": torch.device("cpu"),
    "config": SimpleNamespace(splitlearn_attention="sdpa"),
}


def test_alone_a_session_gets_the_librarys_own_mask():
    assert torch.equal(slot_mask(**ASKED), sdpa_mask(**ASKED))
    assert slot_mask(**ASKED | {"q_length": 1, "q_offset": 3}) is None


def test_each_row_sees_up_to_its_own_position():
    with ragged(torch.tensor([[0, 1], [2, 3]])):
        seen = slot_mask(**ASKED)
    assert seen[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert seen[1, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_the_key_mask_hides_columns():
    hidden = torch.tensor([[True] * 4, [False, True, True, True]])
    with ragged(torch.tensor([[0, 1], [2, 3]]), hidden):
        seen = slot_mask(**ASKED)
    assert seen[1, 0].int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]


def test_eager_attention_gets_numbers_to_add():
    eager = SimpleNamespace(splitlearn_attention="eager")
    with ragged(torch.tensor([[0, 1], [2, 3]])):
        added = slot_mask(**ASKED | {"config": eager, "dtype": torch.bfloat16})
    assert added.dtype == torch.bfloat16
    assert added[0, 0, 0].tolist() == [0, *[torch.finfo(torch.bfloat16).min] * 3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_vmap": True}, "of the family's own making"),
        ({"attention_mask": torch.tensor([[True, False, True, True]])}, "2-D mask"),
        ({"allow_is_bidirectional_skip": True}, "allow_is_bidirectional_skip"),
        ({"something_new": 1}, "something_new"),
        ({"config": SimpleNamespace(splitlearn_attention="flex_attention")}, "flex_attention"),
    ],
)
def test_what_a_ragged_batch_does_not_know_raises(change: dict, named: str):
    with ragged(torch.tensor([[0, 1], [2, 3]])), pytest.raises(UnsupportedModel, match=named):
        slot_mask(**ASKED | change)


def test_only_the_decoder_asks_for_slot_masks():
    config = tiny_config("llama", attn_implementation="sdpa")
    own = with_slot_masks(config)
    assert (own._attn_implementation, own.splitlearn_attention) == (SLOTS, "sdpa")
    assert config._attn_implementation == "sdpa"


def test_a_ragged_batch_ends_with_its_block():
    with pytest.raises(ValueError, match="in between"), ragged(torch.zeros(2, 2)):
        raise ValueError("in between")
    assert torch.equal(slot_mask(**ASKED), sdpa_mask(**ASKED))
