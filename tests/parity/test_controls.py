"""The equalities can fail: what is sabotaged here must show in them."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from splitlearn.client.session import ClientSession
from splitlearn.engine import runner
from splitlearn.engine.session import Session
from splitlearn.errors import UnsupportedCall
from splitlearn.testing import parity
from splitlearn.testing.pair import Pair, lively_model, served_pair
from splitlearn.testing.parity import Distance

FAR = 1e-3
"""A hundred times what the batched path is allowed."""


@pytest.mark.parametrize("check", [parity.logits_without_cache, parity.logits_with_cache])
def test_one_changed_weight_of_the_trunk_shows(pair: Pair, check: Callable[[Pair], Distance]) -> None:
    weight = next(weight for weight in pair.engine.trunk.layers.parameters() if weight.ndim > 1)
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.copy_(kept.flip(-1))
        found = check(pair)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert not found.bitwise
    assert found.relative > FAR


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with served_pair(lively_model("llama", tmp_path_factory.mktemp("model"))) as pair:
        yield pair


def test_a_cache_that_is_not_cropped_shows(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = Session.prepare
    monkeypatch.setattr(
        Session, "prepare", lambda self, step, kv: prepare(self, replace(step, keep_positions=None), kv)
    )
    assert differs(parity.prompt_lookup(llama))


def test_a_session_that_is_not_cropped_with_its_cache_is_refused(
    llama: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClientSession, "crop", lambda *_: None)
    with pytest.raises(UnsupportedCall, match="torn"):
        parity.prompt_lookup(llama)


def test_rows_that_are_not_moved_show(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "_select", lambda *_: None)
    assert differs(parity.beams(llama))
    assert parity.greedy(llama).bitwise


def test_padding_that_is_looked_at_shows(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClientSession, "_new_columns", lambda *_: None)
    assert differs(parity.greedy(llama))


def test_a_mask_that_ignores_each_rows_own_length_shows(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ragged", lambda *_: nullcontext())
    assert differs(parity.batched_logits(llama))


def test_unsabotaged_all_of_them_agree(llama: Pair) -> None:
    for check in (parity.prompt_lookup, parity.beams, parity.greedy):
        assert check(llama).bitwise
    assert not differs(parity.batched_logits(llama))


def differs(found: Distance) -> bool:
    return found.relative > FAR
