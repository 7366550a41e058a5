"""The held-out loss as a mean over tokens, so that it says the same whatever the batches are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splitlearn.errors import DataError, SettingError
from splitlearn.training.tokens import IGNORED

# B rows   T tokens


@torch.no_grad()
def held_out_loss(model: Any, batches: Iterable[Mapping[str, Any]]) -> float:
    """The mean of the loss over all learned tokens of these batches, in nats a token.

    Each token weighs the same, where a mean of the batches' means gives more weight to a token that
    stands in a batch with few of them. So the number depends neither on the batch size nor on padding
    or packing, and a split model's can be held against a whole one's.

    Args:
        model: a causal LM, split or whole, bare or PEFT's; it is in eval mode meanwhile.
        batches: keyword arguments of the model's forward, for example a `DataLoader`'s batches. Their
            `labels` (B, T) give the weights: those that are not -100 count, without each row's first,
            which nothing predicts.

    Raises:
        DataError: no token of them is learned.
    """
    was_training = model.training
    model.eval()
    mean = TokenMean()
    try:
        for batch in batches:
            sent = {name: _to(model.device, value) for name, value in batch.items()}
            # A cache would be of no use, and on the trunk it would be a session.
            loss = model(**{**sent, "use_cache": False}).loss
            mean.add(float(loss), learned_tokens(batch["labels"]))
    finally:
        model.train(was_training)
    return mean.value


class TokenWeightedEvaluation:
    """Put before a trainer: `class MyTrainer(TokenWeightedEvaluation, SplitTrainer)`.

    Its `eval_loss` is the mean over all learned tokens, as `held_out_loss` gives it, where the library's
    is the mean of the batches' means. All else of an evaluation is the library's. It fits a `Trainer`
    of a whole model as well, in one process on one device: several pad the last batches with examples
    that have been counted already.

    Raises:
        SettingError: there are several processes or devices.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        world, devices = self.args.world_size, self.args.n_gpu  # type: ignore[attr-defined]
        if max(world, devices) > 1:
            raise SettingError(
                f"a held-out loss by the token is computed by one process on one device, here are {world} "
                f"processes with {devices} devices each: leave TokenWeightedEvaluation out, or evaluate with "
                "held_out_loss in one process (CUDA_VISIBLE_DEVICES=0)"
            )

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._mean = TokenMean()
        output = super().evaluation_loop(  # type: ignore[misc]
            *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        if self._mean.tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = self._mean.value
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        learned = learned_tokens(inputs["labels"]) if "labels" in inputs else 0
        found = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if found[0] is not None:
            self._mean.add(float(found[0]), learned)
        return found


@dataclass(slots=True)
class TokenMean:
    """A mean over tokens, made of batches' means."""

    total: float = 0.0
    tokens: int = 0

    def add(self, mean: float, tokens: int) -> None:
        # A batch without learned tokens has no mean: the library's loss is not a number then.
        if tokens:
            self.total, self.tokens = self.total + mean * tokens, self.tokens + tokens

    @property
    def value(self) -> float:
        if not self.tokens:
            raise DataError("no token of what is held out is learned: hold more examples out, or longer ones")
        return self.total / self.tokens


def learned_tokens(labels_BT: Tensor) -> int:
    """The terms of a causal LM's loss with these labels: nothing predicts a row's first token."""
    return int((labels_BT[:, 1:] != IGNORED).sum())


def _to(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
