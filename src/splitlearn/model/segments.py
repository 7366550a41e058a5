"""Cutting a family's own class: the client keeps bottom and top of it, the server the trunk.

`client_class` and `trunk_class` are subclasses that cut while they are built, so that the library's
own `from_pretrained` builds them on the meta device and then reads only what is left. Every
parameter keeps the name that it has in the whole model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from splitlearn.model.attention import refuse_packed
from splitlearn.model.families import Family, family_of
from splitlearn.model.masks import FORMS, with_slot_masks
from splitlearn.model.plan import SplitPlan
from splitlearn.model.rotary import guard_recomputed_rotary
from splitlearn.model.skeleton import (
    around_the_layers,
    check_plan_fits,
    decoder_of,
    is_embedding,
    is_rotary,
    layer_list_name,
    layers_of,
    only_layer_type,
)
from splitlearn.model.stand_in import AnswerForm, PassedLayer, RemoteLayer

# B rows   T tokens   D hidden


# ---------------------------------------------------------------- the client's side


def client_class(
    causal_lm_class: type[PreTrainedModel], plan: SplitPlan, remote: Callable[[], nn.Module]
) -> type[PreTrainedModel]:
    """The library's own class, with `remote()` at index k and nothing in the trunk's other places.

    `remote()` gives a module without parameters and buffers whose
    `forward(hidden_states, **what_the_layer_was_given)` answers with the trunk's hidden state.
    """

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        check_plan_fits(config, plan)
        causal_lm_class.__init__(self, config, *args, **kwargs)
        _stand_in_for_trunk(self, plan, remote())

    return _subclass(causal_lm_class, __init__=build)


def _stand_in_for_trunk(causal_lm: nn.Module, plan: SplitPlan, remote: nn.Module) -> None:
    if any(True for _ in (*remote.parameters(), *remote.buffers())):
        raise TypeError(f"{type(remote).__name__} holds tensors; the checkpoint has none for it")
    layers = layers_of(decoder_of(causal_lm))
    form = AnswerForm()
    layers[plan.bottom[-1]].register_forward_hook(form.learn)
    first, *others = plan.trunk
    layers[first] = RemoteLayer(layers[first], form, remote)
    for index in others:
        layers[index] = PassedLayer(layers[index], form)
    guard_recomputed_rotary(causal_lm)


# ---------------------------------------------------------------- the server's side


def trunk_class(causal_lm_class: type[PreTrainedModel], plan: SplitPlan) -> type[PreTrainedModel]:
    """The library's own class with the trunk's layers alone; `TrunkSegment` runs it."""

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        check_plan_fits(config, plan)
        causal_lm_class.__init__(self, config, *args, **kwargs)
        _keep_trunk(self, plan)

    # The plans of the head's placement have no head to place.
    no_head: dict[str, Any] = {"_tied_weights_keys": {}, "_tp_plan": {}, "_pp_plan": {}}
    return _subclass(causal_lm_class, __init__=build, _fsdp_plan={}, **no_head)


def _keep_trunk(causal_lm: nn.Module, plan: SplitPlan) -> None:
    _keep_layers(causal_lm, plan.trunk)
    _share_cut_config(causal_lm, plan.trunk)
    for owner, name, module in list(around_the_layers(causal_lm)):
        if is_embedding(module):
            setattr(owner, name, _NoTable())
        elif not is_rotary(module):
            setattr(owner, name, nn.Identity())
    for module in causal_lm.modules():
        if "all_tied_weights_keys" in vars(module):
            vars(module)["all_tied_weights_keys"] = {}


def _keep_layers(causal_lm: nn.Module, kept: range) -> None:
    """The list is keyed by the whole model's indices; the layers know their own cache's."""
    decoder = decoder_of(causal_lm)
    layers = layers_of(decoder)
    trunk = nn.ModuleList()
    for own_index, index in enumerate(kept):
        trunk.add_module(str(index), layers[index])
        for module in layers[index].modules():
            if isinstance(vars(module).get("layer_idx"), int):
                vars(module)["layer_idx"] = own_index
    setattr(decoder, layer_list_name(decoder) or "layers", trunk)


def _share_cut_config(causal_lm: nn.Module, kept: range) -> None:
    cut: dict[int, PreTrainedConfig] = {}
    for module in causal_lm.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            if id(config) not in cut:
                cut[id(config)] = cut_config(config, kept)
            module.config = cut[id(config)]


def cut_config(config: PreTrainedConfig, kept: range) -> PreTrainedConfig:
    """The configuration of these layers alone: every list with an entry a layer is cut."""
    own = copy.deepcopy(config)
    layers = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == layers and not name.startswith("_"):
            setattr(own, name, value[kept.start : kept.stop])
    own.num_hidden_layers = len(kept)
    return own


class _NoTable(nn.Module):
    """Where an embedding was: the received state comes after it, so it adds nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())


class Entrance:
    """The received state, on its way to the first kept layer."""

    def __init__(self) -> None:
        self.hidden_BTD: Tensor | None = None


def _enter_at(layer: nn.Module, entrance: Entrance) -> None:
    """Let this one layer take its state from the entrance, whatever the family's forward gives it.

    In `__call__`, never a forward_pre_hook: transformers 5.17 checkpoints `__call__`, so a hook
    would run again at recomputation, with nothing to give, and the gradients would be wrong.
    """
    layer_class = type(layer)

    def enter(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden_BTD = self.entrance.hidden_BTD
        assert hidden_BTD is not None, "run the trunk through TrunkSegment.forward"
        return layer_class.__call__(self, hidden_BTD, *args, **kwargs)

    layer.__class__ = _subclass(layer_class, __call__=enter)
    vars(layer)["entrance"] = entrance


class TrunkSegment(nn.Module):
    """The trunk: hidden state in, hidden state out, through the family's own forward.

    `causal_lm` has the whole model's shape and names (`model.layers.2...`) and the trunk's weights;
    `attention_reason` says why its layers attend as they do.
    """

    causal_lm: PreTrainedModel

    def __init__(
        self, causal_lm: PreTrainedModel, plan: SplitPlan, family: Family, attention_reason: str = ""
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.plan = plan
        self.family = family
        self.attention_reason = attention_reason
        self.config: PreTrainedConfig = causal_lm.config
        self.entrance = Entrance()
        decoder = decoder_of(causal_lm)
        # Asked once: while a decode step runs, its layers attend by another name.
        self._has_masks = self.attention in FORMS
        if self._has_masks:
            decoder.config = with_slot_masks(self.config)
        _enter_at(next(iter(layers_of(decoder))), self.entrance)
        self._takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters

    @classmethod
    def of_whole(cls, whole: PreTrainedModel, plan: SplitPlan) -> TrunkSegment:
        """The trunk of a model in memory; its weights are the same tensors, not copies."""
        shared: dict[int, Any] = {id(each): each for each in (*whole.parameters(), *whole.buffers())}
        causal_lm = copy.deepcopy(whole, shared)
        check_plan_fits(whole.config, plan)
        _keep_trunk(causal_lm, plan)
        return cls(causal_lm, plan, family_of(whole.config))

    def forward(
        self,
        hidden_BTD: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """`attention_mask` is the family's 2-D mask; rows of a `ragged` batch go without it."""
        if not self._has_masks and attention_mask is None:
            refuse_packed(position_ids, self.attention)
        positions = {"position_ids": position_ids} if self._takes_positions else {}
        self.entrance.hidden_BTD = hidden_BTD
        try:
            answer = self.decoder(
                # For shapes and masks alone: the state itself goes in at the first kept layer.
                inputs_embeds=hidden_BTD.detach(),
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
                **positions,
            )
        finally:
            self.entrance.hidden_BTD = None
        hidden: Tensor = answer[0]
        return hidden

    # Looked up once: the library finds them by walking all modules, and every step asks.
    @cached_property
    def decoder(self) -> nn.Module:
        return decoder_of(self.causal_lm)

    @cached_property
    def layers(self) -> nn.ModuleList:
        return layers_of(self.decoder)

    @cached_property
    def _a_weight(self) -> nn.Parameter:
        return next(self.layers.parameters())

    @property
    def num_layers(self) -> int:
        return len(self.plan.trunk)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def attention(self) -> str:
        """The attention implementation that the layers use."""
        return str(self.config._attn_implementation)

    @property
    def batched(self) -> bool:
        """Whether rows of different length may run together."""
        return not self.batched_reason

    @property
    def batched_reason(self) -> str:
        """Why they may not; empty where they may."""
        no_masks = "" if self.attention in FORMS else f"{self.attention} takes no masks by position"
        return self.family.reason or no_masks

    @property
    def layer_types(self) -> list[str]:
        """For each kept layer: full_attention, sliding_attention or chunked_attention."""
        named = getattr(self.config, "layer_types", None)
        return list(named) if named else [only_layer_type(self.config)] * self.num_layers

    @property
    def sliding_window(self) -> list[int | None]:
        """For each kept layer, how many of the last tokens it sees; None is all."""
        window = getattr(self.config, "sliding_window", None)
        return [window if kind == "sliding_attention" else None for kind in self.layer_types]

    @property
    def max_positions(self) -> int | None:
        """The longest text that the model was made for, where its configuration says so."""
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            positions = getattr(self.config, name, None)
            if isinstance(positions, int):
                return positions
        return None

    @property
    def dtype(self) -> torch.dtype:
        return self._a_weight.dtype

    @property
    def device(self) -> torch.device:
        return self._a_weight.device


def _subclass(base: type[Any], **attributes: Any) -> type[Any]:
    """The same class by name and module, so that the library takes it for its own."""
    home = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), home | attributes)
