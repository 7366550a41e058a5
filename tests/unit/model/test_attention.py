"""Attention is chosen so that nothing is lost by it; what is forced is done or refused with the reason."""

import sys

import pytest
import torch
import transformers.modeling_flash_attention_utils as library
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from splitlearn.errors import SettingError, UnsupportedCall
from splitlearn.model import attention
from splitlearn.model.attention import COST, FLASH, Attention, Device, choose_attention
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.families import family_of
from splitlearn.model.plan import SplitPlan
from splitlearn.model.weights import load_trunk
from splitlearn.testing.loopback import split_over_loopback
from splitlearn.testing.pair import lively_model
from splitlearn.testing.tiny import PROVEN, UNLISTED, VARIANTS, tiny_config, tiny_whole

# B rows   T tokens   H heads   G key/value heads   K columns   E head size

GPU = Device("cuda", (8, 0))
HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("family", "dtype", "device", "chosen"),
    [
        ("llama", HALF, GPU, Attention("sdpa", COST)),
        ("olmo", HALF, GPU, Attention(FLASH, "installed, and sessions of this family run one by one")),
        ("olmo", torch.float16, Device("cuda", (9, 0)), Attention(FLASH, "installed")),
        ("phi3(longrope)", HALF, GPU, Attention(FLASH, "installed")),
        ("olmo", torch.float32, GPU, Attention("sdpa", "flash-attention: it computes in bfloat16 and fl")),
        ("olmo", HALF, Device("cpu"), Attention("sdpa", "flash-attention: it needs a CUDA device, this is")),
        ("olmo", HALF, Device("cuda", (7, 5)), Attention("sdpa", "flash-attention: it needs compute capab")),
        ("olmo", HALF, Device("cuda", (8, 0), "it is old"), Attention("sdpa", "flash-attention: it is old")),
        ("falcon(alibi)", HALF, GPU, Attention("sdpa", "flash-attention: it knows no ALiBi")),
        ("mpt", HALF, GPU, Attention("eager", "flash-attention: transformers has none for mpt; SDPA: tra")),
        ("gemma2", HALF, GPU, Attention("eager", f"{COST}; SDPA: transformers has none for gemma2")),
        ("gpt_oss", HALF, GPU, Attention("eager", "flash-attention: gpt_oss needs another kernel; SDPA")),
    ],
)
def test_the_automatic_choice(family: str, dtype: torch.dtype, device: Device, chosen: Attention):
    found = choose_attention("auto", tiny_config(family), dtype, device)
    assert found.implementation == chosen.implementation
    assert found.reason.startswith(chosen.reason)


@pytest.mark.parametrize("family", [*PROVEN, *VARIANTS, *UNLISTED])
def test_without_flash_attention_the_choice_is_the_librarys_own(family: str):
    config = tiny_config(family)
    with torch.device("meta"):
        own = AutoModelForCausalLM.from_config(config).config._attn_implementation
    assert choose_attention("auto", config, HALF, Device("cpu")).implementation == own


@pytest.mark.parametrize("family", [*PROVEN, *VARIANTS, *UNLISTED])
def test_no_family_loses_its_batches_by_the_automatic_choice(family: str):
    config = tiny_config(family)
    chosen = choose_attention("auto", config, HALF, GPU).implementation
    assert chosen != FLASH or not family_of(config).batched


@pytest.mark.parametrize("wanted", ["sdpa", "eager"])
def test_what_is_asked_for_is_taken(wanted):
    assert choose_attention(wanted, tiny_config("olmo"), HALF, GPU) == Attention(wanted, "asked for")


def test_flash_attention_that_is_asked_for_says_what_it_costs():
    assert choose_attention("flash", tiny_config("olmo"), HALF, GPU) == Attention(FLASH, "asked for")
    assert choose_attention("flash", tiny_config("llama"), HALF, GPU).reason == f"asked for; {COST}"


@pytest.mark.parametrize(
    ("wanted", "family", "overrides", "device", "reason"),
    [
        ("sdpa", "gemma2", {}, GPU, "transformers has none for gemma2"),
        ("flash", "mpt", {}, GPU, "transformers has none for mpt"),
        ("flash", "gpt_oss", {}, GPU, "needs another kernel"),
        ("flash", "llama", {"head_dim": 512}, GPU, "its heads have up to 256 values, these 512"),
        ("flash", "gpt2", {"n_embd": 2048}, GPU, "these 512"),
        ("flash", "deepseek_v3", {"qk_nope_head_dim": 256}, GPU, "its heads have up to 256 values"),
        ("flash", "llama", {"attention_chunk_size": 8}, GPU, "it knows no chunks"),
        ("flash", "llama", {}, Device("cuda", (9, 0), "it is not installed"), "not installed; take 'auto'"),
        ("flash", "llama", {}, Device("cpu"), "this is cpu; take 'auto'"),
    ],
)
def test_what_is_asked_for_and_not_possible_is_refused(wanted, family, overrides, device, reason):
    with pytest.raises(SettingError, match=reason):
        choose_attention(wanted, tiny_config(family, **overrides), HALF, device)


def test_a_package_that_is_not_there_or_older_is_named(monkeypatch):
    assert "pip install flash-attn" in attention.package_fault()
    monkeypatch.setattr(attention, "version", lambda name: "2.5.9")
    assert "cannot be imported (No module named 'flash_attn')" in attention.package_fault()
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    assert attention.package_fault() == "it is 2.5.9, older than 2.6"
    monkeypatch.setattr(attention, "version", lambda name: "2.8.3")
    assert attention.package_fault() == ""


# What runs around flash-attention, with its two functions written down in torch: here is no GPU for its own.


@pytest.fixture
def written_down(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two functions ran, in order."""
    ran: list[str] = []

    def rows(q_BTHE: Tensor, k_BKGE: Tensor, v_BKGE: Tensor, **how: object) -> Tensor:
        ran.append("rows")
        return attend(q_BTHE, k_BKGE, v_BKGE, **how)

    def unpadded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **how: object):
        ran.append("unpadded")
        starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        each = zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
        parts = [attend(q[None, a:b], k[None, c:d], v[None, c:d], **how)[0] for a, b, c, d in each]
        return torch.cat(parts)

    def imports(*_: object, **__: object):
        return rows, unpadded, None, library._pad_input, library._unpad_input

    monkeypatch.setattr(library, "_lazy_imports", imports)
    monkeypatch.setattr(library, "_lazy_define_process_function", lambda _: processed)
    monkeypatch.setattr(library, "_loaded_implementation", None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    monkeypatch.setattr(attention, "why_no_flash", lambda *_: "")
    return ran


def processed(
    query_length: int,
    key_length: int,
    is_causal: bool,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> dict[str, object]:
    """What the library asks the package for, as a release with windows and soft caps is asked."""
    window = sliding_window if sliding_window is not None and key_length > sliding_window else None
    return {"causal": is_causal, "scale": softmax_scale, "window": window, "softcap": softcap}


def attend(
    q_BTHE: Tensor,
    k_BKGE: Tensor,
    v_BKGE: Tensor,
    *,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The last query sees the last key, as in flash-attention from 2.1 on."""
    (tokens, heads), columns, groups = q_BTHE.shape[1:3], k_BKGE.shape[1], k_BKGE.shape[2]
    k_BHKE, v_BHKE = (each.transpose(1, 2).repeat_interleave(heads // groups, 1) for each in (k_BKGE, v_BKGE))
    score_BHTK = q_BTHE.transpose(1, 2) @ k_BHKE.transpose(2, 3) * (scale or q_BTHE.shape[-1] ** -0.5)
    if softcap:
        score_BHTK = softcap * (score_BHTK / softcap).tanh()
    age_TK = torch.arange(tokens)[:, None] + columns - tokens - torch.arange(columns)
    seen_TK = (age_TK >= 0) & (age_TK < (window or columns)) if causal else torch.ones_like(age_TK) > 0
    return (score_BHTK.masked_fill(~seen_TK, -torch.inf).softmax(-1) @ v_BHKE).transpose(1, 2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "deepseek_v3", "phi3(longrope)", "olmo"])
def test_a_trunk_that_takes_it_writes_the_whole_models_texts(
    family: str, tmp_path, written_down, recwarn, ids: Tensor, left_padded: Tensor
):
    folder = lively_model(family, tmp_path)
    whole = tiny_whole(folder)
    with split_over_loopback(folder, attention="flash") as split:
        assert split.trunk.transport.agreement.attention == FLASH
        for how in ({}, {"num_beams": 3}):
            told = {"attention_mask": left_padded, "max_new_tokens": 12, "do_sample": False, **how}
            assert split.generate(ids, **told).tolist() == whole.generate(ids, **told).tolist()
        with torch.no_grad():
            ours, theirs = (model(ids, use_cache=False).logits for model in (split, whole))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert {"rows", "unpadded"} <= set(written_down)
    assert not [each for each in recwarn if "attends with" in str(each.message)]


def test_it_runs_one_by_one_and_says_so(folder_of, written_down):
    checkpoint = Checkpoint.open(folder_of("llama"))
    trunk = load_trunk(checkpoint, SplitPlan(6, 2, 2), attention="flash")
    assert (trunk.attention, trunk.attention_reason) == (FLASH, f"asked for; {COST}")
    assert (trunk.batched, trunk.batched_reason) == (False, f"{FLASH} takes no masks by position")


def test_examples_that_are_packed_into_rows_are_refused(folder_of, written_down):
    trunk = load_trunk(Checkpoint.open(folder_of("llama")), SplitPlan(6, 2, 2), attention="flash")
    hidden_BTD, packed_BT = torch.zeros(2, 6, trunk.hidden_size), torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    with pytest.raises(UnsupportedCall, match="--attention sdpa"):
        trunk(hidden_BTD, position_ids=packed_BT)
    trunk(hidden_BTD, position_ids=torch.arange(6).expand(2, 6))
