"""What stands at the client where the trunk's layers stood, and answers as they did."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# B rows   T tokens   D hidden

CACHE_NAMES = ("past_key_values", "layer_past", "past_key_value")


class AnswerForm:
    """Whether this family's layers answer with a tensor or a tuple: seen at the layer below."""

    def __init__(self) -> None:
        self.is_tuple = False

    def learn(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook of the last bottom layer."""
        self.is_tuple = isinstance(output, tuple)

    def of(self, hidden_BTD: Tensor) -> Tensor | tuple[Tensor]:
        return (hidden_BTD,) if self.is_tuple else hidden_BTD


class StandIn(nn.Module):
    """Takes a layer's place: same arguments, same form of answer, same plain attributes.

    What the family passes by position reaches `trunk_part` by name, and the cache always as
    `past_key_values`, so that the part behind need not know the family.
    """

    def __init__(self, replaced: nn.Module, form: AnswerForm) -> None:
        super().__init__()
        self.form = form
        self.argument_names = argument_names(replaced)
        for name, value in vars(replaced).items():
            if _is_plain(name, value):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        asked = dict(zip(self.argument_names, args, strict=False)) | kwargs
        hidden_BTD = asked.pop("hidden_states")
        for name in CACHE_NAMES[1:]:
            if name in asked:
                asked[CACHE_NAMES[0]] = asked.pop(name)
        return self.form.of(self.trunk_part(hidden_BTD, **asked))

    def trunk_part(self, hidden_BTD: Tensor, **asked: Any) -> Tensor:
        raise NotImplementedError


class RemoteLayer(StandIn):
    """Stands at index k and reaches the trunk through `remote`."""

    remote: nn.Module

    def __init__(self, replaced: nn.Module, form: AnswerForm, remote: nn.Module) -> None:
        super().__init__(replaced, form)
        self.remote = remote

    def trunk_part(self, hidden_BTD: Tensor, **asked: Any) -> Tensor:
        answer_BTD: Tensor = self.remote(hidden_BTD, **asked)
        return answer_BTD


class PassedLayer(StandIn):
    """Stands at k+1 .. n-m-1, so that every other layer keeps its index and its name."""

    def trunk_part(self, hidden_BTD: Tensor, **asked: Any) -> Tensor:
        return hidden_BTD


def argument_names(layer: nn.Module) -> tuple[str, ...]:
    """What a layer calls the arguments that it takes by position."""
    forward: Callable[..., Any] = type(layer).forward
    takes = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(each.name for each in takes if each.kind is each.POSITIONAL_OR_KEYWORD)


def _is_plain(name: str, value: Any) -> bool:
    """For example `attention_type`, which some families' forward reads from each layer."""
    own = name.startswith("_") or name == "training"
    return not own and isinstance(value, str | int | float | bool | None)
