"""A fork shares its parent's slots until one of them writes there; each sees its own tokens all the same."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from splitlearn.engine.kv_cache import KvCache, LayerShape
from splitlearn.engine.session import Session
from splitlearn.vocabulary import Precision, StepKey
from splitlearn.wire.messages import StepMessage

TOKENS = 10
PADDING = -1


class CountingCache(KvCache):
    """Counts the tokens that are copied."""

    copied = 0

    def copy(self, pairs, length):
        pairs = list(pairs)
        self.copied += len(pairs) * length
        super().copy(pairs, length)


def cache(slots: int = 40) -> CountingCache:
    return CountingCache(
        [LayerShape(1, 1, 1)] * 2,
        budget_bytes=slots * TOKENS * 16,
        slot_tokens=TOKENS,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


class Text:
    """A session, and what its rows ought to hold."""

    def __init__(self, kv: KvCache, rows: int, parent: "Text | None" = None) -> None:
        self.kv = kv
        self.session = Session((b"client", 1), 0, Precision(), kv.take(rows), lease_until=0.0)
        self.expected: list[list[float]] = [[] for _ in range(rows)]
        if parent is not None:
            self.session.borrow(parent.session)
            self.expected = [list(row) for row in parent.expected]

    def fork(self) -> "Text":
        return Text(self.kv, len(self.expected), self)

    def step(self, value: float, *, keep: int | None = None, rows: tuple[int, ...] | None = None) -> None:
        """One new token a row; they are padding where the value says so."""
        session = self.session
        if rows is not None:
            self.expected = [list(self.expected[row]) for row in rows]
        if keep is not None:
            self.expected = [row[:keep] for row in self.expected]
        count = len(self.expected)
        mask_B1 = torch.zeros(count, 1, dtype=torch.bool) if value == PADDING else None
        message = StepMessage(
            StepKey(session=1, step=1),
            torch.zeros(count, 1, 4),
            keep_positions=keep,
            select_rows=rows,
            mask_columns_BT=mask_B1,
        )
        session.check(message, TOKENS, None)
        session.prepare(message, self.kv)
        for row, slot in enumerate(session.slots):
            for layer in (*self.kv.keys_SHLE, *self.kv.values_SHLE):
                layer[slot, :, session.length] = value + row / 8
            self.expected[row].append(value + row / 8)
        session.length += 1

    def is_right(self) -> bool:
        length = self.session.length
        layers = (*self.kv.keys_SHLE, *self.kv.values_SHLE)
        visible = [[token >= 0 for token in row] for row in self.expected]
        slots = list(self.session.holding)
        held = all(layer[slots, 0, :length, 0].tolist() == self.expected for layer in layers)
        return held and self.kv.visible_SL[slots, :length].tolist() == visible


def begun(rows: int = 2, tokens: int = 3) -> Text:
    text = Text(cache(), rows)
    for token in range(tokens):
        text.step(token + 1)
    return text


Change = Callable[[Text, Text], object]
WITHOUT_A_COPY: dict[str, Change] = {
    "nothing": lambda parent, fork: None,
    "its parent goes on": lambda parent, fork: [parent.step(9), parent.step(9)],
    "its parent is cropped behind it": lambda parent, fork: [parent.step(9), parent.step(8, keep=3)],
    "it is emptied": lambda parent, fork: fork.step(9, keep=0),
    "it is closed": lambda parent, fork: fork.session.free(fork.kv),
    "its parent is closed": lambda parent, fork: parent.session.free(fork.kv),
    "it takes over and goes on": lambda parent, fork: [
        parent.step(9),
        parent.session.free(parent.kv),
        fork.step(8),
    ],
}
WITH_COPIES: dict[str, tuple[Change, int]] = {
    "it goes on": (lambda parent, fork: [fork.step(9), fork.step(9)], 2 * 3),
    "it is cropped": (lambda parent, fork: fork.step(9, keep=2), 2 * 2),
    "its rows change": (lambda parent, fork: fork.step(9, rows=(1, 1, 0)), 3 * 3),
    "fewer rows are left": (lambda parent, fork: fork.step(9, rows=(1,)), 3),
    "its parent is cropped": (lambda parent, fork: parent.step(9, keep=1), 2 * 3),
    "its parent's rows change": (lambda parent, fork: parent.step(9, rows=(1, 0)), 2 * 3),
}


@pytest.mark.parametrize("change", WITHOUT_A_COPY.values(), ids=list(WITHOUT_A_COPY))
def test_a_fork_is_not_copied_for(change: Change) -> None:
    parent = begun()
    fork = parent.fork()
    copied = parent.kv.copied
    change(parent, fork)
    assert parent.kv.copied == copied
    assert fork.is_right()


@pytest.mark.parametrize(("change", "tokens"), WITH_COPIES.values(), ids=list(WITH_COPIES))
def test_of_a_fork_only_what_it_keeps_is_copied_once(change: Change, tokens: int) -> None:
    parent = begun()
    fork = parent.fork()
    change(parent, fork)
    assert parent.kv.copied == tokens
    assert parent.is_right()
    assert fork.is_right()


def test_a_fork_has_its_place_from_the_start() -> None:
    parent = begun()
    free = parent.kv.free_bytes
    fork = parent.fork()
    assert parent.kv.free_bytes == free - 2 * parent.kv.slot_bytes
    fork.session.free(parent.kv)
    assert parent.kv.free_bytes == free


@settings(max_examples=300, deadline=None)
@example([(0, 0, 0), (3, 0, 0)])
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 99), st.integers(0, 99)), max_size=25))
def test_whatever_sessions_and_their_forks_do_each_holds_its_own_tokens(moves) -> None:
    kv = cache(200)
    texts = [Text(kv, 2)]
    for value, (kind, which, how) in enumerate(moves):
        if not texts:
            break
        text = texts[which % len(texts)]
        rows, length = len(text.expected), text.session.length
        if kind == 0:
            texts.append(text.fork())
        elif kind == 1:
            text.session.free(kv)
            texts.remove(text)
        elif kind == 2:
            text.step(value, keep=how % (length + 1) if length else None)
        elif kind == 3 and length < TOKENS:
            text.step(value, rows=tuple((how + row // 2) % rows for row in range(how % 3 + 1)))
        elif length < TOKENS:
            text.step(PADDING if how % 2 else value)
        assert all(each.is_right() for each in texts)
    taken = [slot for text in texts for slot in text.session.slots]
    assert len(set(taken)) == len(taken)
    assert kv.free_bytes == (kv.slots - len(taken)) * kv.slot_bytes
    for text in texts:
        text.session.free(kv)
    assert not any(layer.any() for layer in (*kv.keys_SHLE, *kv.values_SHLE))
    assert kv.visible_SL.all()
