"""Whether a training step gives the whole model's gradients; the trunk's are compared by their norms."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from splitlearn.client.parts import trunk_of
from splitlearn.model.lora import ADAPTER, add_lora, settings_of, weights_of

LORA = LoraConfig(r=4, target_modules="all-linear")
SEED = 0
Gradients = dict[str, Tensor]


def check_gradients(split: Any, whole: Any, inputs: Gradients, tolerance: float) -> tuple[bool, str]:
    """One forward and backward of each with the same adapter, which the whole model is given here.

    Args:
        split: loaded with `lora=LORA` and `seed=SEED`.
    """
    add_lora(whole, settings_of(LORA, whole.config.model_type), ADAPTER, SEED)
    for model in (split, whole):
        model.eval()  # no dropout, whatever the model's own configuration says
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    ours, theirs = _gradients(split), _gradients(whole)
    # Those that are not here have only their norms here.
    norms_N = torch.stack([theirs[name].norm() for name in theirs.keys() - ours.keys()]).sort().values
    trunk_N = trunk_of(split).grad_norms().sort().values
    if norms_N.shape != trunk_N.shape:
        return False, f"the trunk has gradients of {len(trunk_N)} weights, not of {len(norms_N)}"
    apart = [(ours[name] - theirs[name]).norm() for name in ours] + [(norms_N - trunk_N).norm()]
    relative = float(
        torch.stack(apart).norm() / torch.stack([each.norm() for each in theirs.values()]).norm()
    )
    if relative == 0:
        return True, f"bit for bit equal ({len(ours)} here), as are the norms of the trunk's {len(trunk_N)}"
    found = f"not bit for bit: {relative:.1e} of the whole gradient's norm apart"
    if not relative <= tolerance:
        found += f", more than the {tolerance:.0e} that rounding explains"
    return relative <= tolerance, found


def _gradients(model: Any) -> Gradients:
    found = {name: weight.grad for name, weight in weights_of(model, ADAPTER).items()}
    return {name: gradient.cpu().float() for name, gradient in found.items() if gradient is not None}
