"""Split against whole: both are asked the same, and their logits and texts are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from splitlearn.testing.pair import Pair, meeting
from splitlearn.testing.tiny import VOCABULARY

# B rows   T tokens   V vocabulary

Given = TypeVar("Given")

NEW_TOKENS = 20
BEAMS = 3
FIRST_PLAIN_TOKEN = 4
PADDING = 4
STEPS = (7, 1, 1, 1, 3, 1)
"""How many tokens each call brings when a text is read in pieces; longer in all than a tiny window."""
LENGTHS = (5, 17)
"""Prompts of the sessions that meet in one batch: within a tiny model's window of 8, and beyond it."""
DECODES = (1, 1, 3, 1, 2, 1, 1)
"""How many tokens each step brings that such sessions take together."""


@dataclass(frozen=True, slots=True)
class Distance:
    """How far the split model is from the whole one.

    `relative` is the largest difference of a logit over the largest logit; `texts_equal` is true
    where no text was made; `ragged` counts batches of sessions of different length.
    """

    bitwise: bool
    relative: float
    texts_equal: bool = True
    ragged: int = 0

    def __or__(self, other: Distance) -> Distance:
        """The worse of both."""
        return Distance(
            self.bitwise and other.bitwise,
            max(self.relative, other.relative),
            self.texts_equal and other.texts_equal,
            self.ragged + other.ragged,
        )


def distance(whole: Tensor, split: Tensor) -> Distance:
    if whole.shape != split.shape:
        return Distance(False, float("inf"))
    apart = (whole - split).abs().max() / whole.abs().max()
    return Distance(torch.equal(whole, split), float(apart))


# ---------------------------------------------------------------- rows alone


def logits_without_cache(pair: Pair) -> Distance:
    ids_BT = _ids(2, 12)
    return distance(*(_logits(model, ids_BT, use_cache=False) for model in (pair.whole, pair.split)))


def logits_with_cache(pair: Pair) -> Distance:
    """One row, and two of the same length, each read in pieces."""
    return _read(pair, _ids(1, sum(STEPS))) | _read(pair, _ids(2, sum(STEPS)))


def logits_left_padded(pair: Pair) -> Distance:
    return _padded(pair, slice(None, PADDING))


def logits_right_padded(pair: Pair) -> Distance:
    return _padded(pair, slice(-PADDING, None))


def greedy(pair: Pair) -> Distance:
    return _texts(pair, _ids(2, 12), _left_mask(2, 12))


def beams(pair: Pair) -> Distance:
    return _texts(pair, _ids(2, 12), _left_mask(2, 12), num_beams=BEAMS)


def sampling(pair: Pair) -> Distance:
    return _texts(pair, _ids(2, 12), _left_mask(2, 12), do_sample=True)


def prompt_lookup(pair: Pair) -> Distance:
    """A prompt that repeats itself, so that candidates are found, taken and cropped."""
    ids_BT = _ids(1, 6).repeat(1, 3)
    return _texts(pair, ids_BT, torch.ones_like(ids_BT), prompt_lookup_num_tokens=3)


def greedy_without_cache(pair: Pair) -> Distance:
    return _texts(pair, _ids(2, 12), _left_mask(2, 12), use_cache=False)


ALONE: dict[str, Callable[[Pair], Distance]] = {
    check.__name__: check
    for check in (
        logits_without_cache,
        logits_with_cache,
        logits_left_padded,
        logits_right_padded,
        greedy,
        beams,
        sampling,
        prompt_lookup,
        greedy_without_cache,
    )
}


def _read(pair: Pair, ids_BT: Tensor) -> Distance:
    whole, split = (read_in_pieces(model, ids_BT, STEPS) for model in (pair.whole, pair.split))
    return distance(whole, split)


def _padded(pair: Pair, padding: slice) -> Distance:
    """With and without the cache, at the positions that are not padding."""
    ids_BT, mask_BT = _ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask_BT[1, padding] = 0
    worst = Distance(True, 0.0)
    for use_cache in (False, True):
        whole, split = (
            _logits(model, ids_BT, attention_mask=mask_BT, use_cache=use_cache)[mask_BT.bool()]
            for model in (pair.whole, pair.split)
        )
        worst |= distance(whole, split)
    return worst


def _texts(pair: Pair, ids_BT: Tensor, mask_BT: Tensor, **how: Any) -> Distance:
    whole, split = (write(model, ids_BT, mask_BT, **how) for model in (pair.whole, pair.split))
    return _distance_of_texts(whole, split)


# ---------------------------------------------------------------- sessions in one batch


def batched_logits(pair: Pair) -> Distance:
    """Two sessions of different length take every later step in one batch."""
    jobs = [
        partial(
            read_in_pieces,
            ids_BT=_ids(1, length + sum(DECODES), seed=length),
            steps=(length, *DECODES),
        )
        for length in LENGTHS
    ]
    return _together(pair, jobs, distance)


def batched_greedy(pair: Pair) -> Distance:
    """A padded batch of two rows beside a longer row."""
    return _together(pair, [_short_text(), _long_text()], _distance_of_texts)


def batched_beams(pair: Pair) -> Distance:
    """Beams, whose rows move at every step, beside a greedy text."""
    return _together(pair, [_short_text(num_beams=BEAMS), _long_text()], _distance_of_texts)


BATCHED: dict[str, Callable[[Pair], Distance]] = {
    check.__name__: check for check in (batched_logits, batched_greedy, batched_beams)
}


def _short_text(**how: Any) -> Callable[[PreTrainedModel], Text]:
    return partial(write, ids_BT=_ids(2, 9), mask_BT=_left_mask(2, 9), **how)


def _long_text() -> Callable[[PreTrainedModel], Text]:
    return partial(write, ids_BT=_ids(1, 17), mask_BT=torch.ones(1, 17, dtype=torch.long))


def _together(
    pair: Pair,
    jobs: Sequence[Callable[[PreTrainedModel], Given]],
    apart: Callable[[Given, Given], Distance],
) -> Distance:
    """The jobs on threads of their own, their steps meeting, against each job alone on the whole model."""
    whole = [job(pair.whole) for job in jobs]
    before = pair.engine.ran.ragged
    with meeting(pair.engine, len(jobs)), ThreadPoolExecutor(len(jobs)) as threads:
        split = [future.result() for future in [threads.submit(job, pair.split) for job in jobs]]
    worst = Distance(True, 0.0, ragged=pair.engine.ran.ragged - before)
    for one, other in zip(whole, split, strict=True):
        worst |= apart(one, other)
    return worst


# ---------------------------------------------------------------- asking a model


@dataclass(frozen=True, slots=True)
class Text:
    """What `generate` wrote, and the logits that it chose from."""

    ids_BT: Tensor
    logits: Tensor


def read_in_pieces(model: PreTrainedModel, ids_BT: Tensor, steps: Sequence[int]) -> Tensor:
    """The logits (B, T, V) of a given text that comes in steps of so many tokens."""
    cache = DynamicCache(config=model.config)
    pieces = torch.split(ids_BT, list(steps), dim=1)
    return torch.cat(
        [_logits(model, piece, past_key_values=cache, use_cache=True) for piece in pieces], dim=1
    )


def write(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, **how: Any) -> Text:
    """A text of `NEW_TOKENS` tokens; a sampled one is the same each time."""
    asked = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS} | how
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        written = model.generate(
            ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            return_dict_in_generate=True,
            output_logits=True,
            **asked,
        )
    return Text(written.sequences.cpu(), torch.stack(written.logits).cpu())


def _distance_of_texts(whole: Text, split: Text) -> Distance:
    apart = distance(whole.logits, split.logits)
    return Distance(apart.bitwise, apart.relative, torch.equal(whole.ids_BT, split.ids_BT))


def _logits(model: PreTrainedModel, ids_BT: Tensor, **how: Any) -> Tensor:
    # A thread has a grad mode of its own.
    with torch.no_grad():
        logits_BTV: Tensor = model(ids_BT.to(model.device), **_moved(how, model.device)).logits
    return logits_BTV.cpu()


def _moved(how: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in how.items()}


def _ids(rows: int, tokens: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY, (rows, tokens), generator=generator)


def _left_mask(rows: int, tokens: int) -> Tensor:
    """The last row is shorter than the others."""
    mask_BT = torch.ones(rows, tokens, dtype=torch.long)
    mask_BT[-1, :PADDING] = 0
    return mask_BT
