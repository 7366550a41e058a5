"""Whether a split model gives what the whole one gives: logits, padded batches, greedy text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splitlearn.cli.checks import Check, failed, ok
from splitlearn.errors import SplitLearnError

# B rows   T tokens   V vocabulary

GREEDY_TOKENS = 20
EXACT_ON_CPU = 1e-5
OTHER_DEVICE = 1e-3
COARSE = 5e-2


@dataclass(frozen=True, slots=True)
class Pair:
    """Both models, and how far apart rounding alone may put their logits."""

    split: Any
    whole: Any
    tolerance: float


def tolerance_of(precisions: set[str], trunk_device: str) -> float:
    """Relative to the largest logit: what the coarsest precision on the way, or another device, explains."""
    if precisions - {"float32", "auto"}:
        return COARSE
    return EXACT_ON_CPU if trunk_device == "cpu" else OTHER_DEVICE


def parity_checks(pair: Pair, inputs: dict[str, Tensor]) -> Iterator[Check]:
    """Each check as it is done; one that raises has failed."""
    yield attempt("logits", lambda: check_logits(pair, inputs, use_cache=True))
    yield attempt("logits, no cache", lambda: check_logits(pair, inputs, use_cache=False))
    yield attempt("padded batch", lambda: check_padded_batch(pair, inputs))
    yield attempt("greedy text", lambda: check_greedy(pair, inputs, use_cache=True))
    yield attempt("greedy text, no cache", lambda: check_greedy(pair, inputs, use_cache=False))


def attempt(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    """What the check found; an error is a failed check."""
    try:
        passed, found = check()
    except SplitLearnError as error:
        return failed(name, error.message)
    return ok(name, found) if passed else failed(name, found)


def check_logits(pair: Pair, inputs: dict[str, Tensor], *, use_cache: bool) -> tuple[bool, str]:
    with torch.inference_mode():
        split_BTV = pair.split(**inputs, use_cache=use_cache).logits
        whole_BTV = pair.whole(**inputs, use_cache=use_cache).logits
    return _compare(split_BTV, whole_BTV, pair.tolerance)


def check_padded_batch(pair: Pair, inputs: dict[str, Tensor]) -> tuple[bool, str]:
    """The prompt and its first half in one batch, padded on the left."""
    batch = left_padded(inputs["input_ids"])
    counts_BT = batch["attention_mask"].bool()
    with torch.inference_mode():
        split_BTV = pair.split(**batch).logits
        whole_BTV = pair.whole(**batch).logits
    return _compare(split_BTV[counts_BT], whole_BTV[counts_BT], pair.tolerance)


def left_padded(ids_1T: Tensor) -> dict[str, Tensor]:
    length = ids_1T.shape[1]
    padding = length - max(1, length // 2)
    mask_BT = torch.ones(2, length, dtype=torch.long)
    mask_BT[1, :padding] = 0
    shorter_1T = torch.cat([torch.zeros(1, padding, dtype=torch.long), ids_1T[:, : length - padding]], dim=1)
    return {"input_ids": torch.cat([ids_1T, shorter_1T]), "attention_mask": mask_BT}


def check_greedy(pair: Pair, inputs: dict[str, Tensor], *, use_cache: bool) -> tuple[bool, str]:
    how = {"max_new_tokens": GREEDY_TOKENS, "do_sample": False, "use_cache": use_cache}
    split_T, whole_T = pair.split.generate(**inputs, **how)[0], pair.whole.generate(**inputs, **how)[0]
    start = inputs["input_ids"].shape[1]
    if torch.equal(split_T, whole_T):
        return True, f"{len(split_T) - start} tokens equal"
    place = _first_difference(split_T, whole_T)
    gap = _gap(pair.whole, whole_T[:place], split_T, whole_T, place)
    found = f"{place - start} tokens equal, then another that the whole model likes less, by {gap:.1e}"
    # In coarse precision two tokens that are nearly as likely may change places.
    return gap <= pair.tolerance, found


def _first_difference(split_T: Tensor, whole_T: Tensor) -> int:
    common = min(len(split_T), len(whole_T))
    differs = (split_T[:common] != whole_T[:common]).nonzero()
    return int(differs[0]) if len(differs) else common


def _gap(whole: Any, text_T: Tensor, split_T: Tensor, whole_T: Tensor, place: int) -> float:
    """How much more the whole model wants its own next token, as a part of its largest logit."""
    if place >= min(len(split_T), len(whole_T)):
        return float("inf")
    with torch.inference_mode():
        logits_V = whole(text_T[None]).logits[0, -1].float()
    return float((logits_V[whole_T[place]] - logits_V[split_T[place]]) / logits_V.abs().max())


def _compare(split_BTV: Tensor, whole_BTV: Tensor, tolerance: float) -> tuple[bool, str]:
    if torch.equal(split_BTV, whole_BTV):
        return True, f"bit for bit equal ({split_BTV.numel():,} numbers)"
    apart = float((split_BTV.float() - whole_BTV.float()).abs().max())
    relative = apart / float(whole_BTV.float().abs().max())
    found = f"not bit for bit: at most {apart:.1e} apart, {relative:.1e} of the largest"
    if relative > tolerance:
        found += f", more than the {tolerance:.0e} that rounding explains"
    return relative <= tolerance, found
