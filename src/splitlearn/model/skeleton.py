"""Where a causal LM keeps its decoder layers, and what stands around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from splitlearn.errors import SplitPlanError, UnsupportedModel
from splitlearn.model.plan import LayeredConfig, SplitPlan

LAYER_LISTS = ("layers", "h", "blocks")


def decoder_of(causal_lm: nn.Module) -> nn.Module:
    """The module that owns the list of layers and runs them."""
    for module in causal_lm.modules():
        if layer_list_name(module) is not None:
            return module
    raise UnsupportedModel(
        f"{type(causal_lm).__name__} has no list of decoder layers called "
        f"{', '.join(LAYER_LISTS)}: this architecture cannot be cut"
    )


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """The decoder's layers; a cut model's list is keyed by the whole model's indices."""
    name = layer_list_name(decoder)
    layers = getattr(decoder, name) if name else None
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModel(f"{type(decoder).__name__} owns no list of decoder layers")
    return layers


def layer_list_name(module: nn.Module) -> str | None:
    """The name under which this module itself keeps decoder layers, if it does."""
    for name in LAYER_LISTS:
        if isinstance(module._modules.get(name), nn.ModuleList):
            return name
    return None


def around_the_layers(causal_lm: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Each module beside the path from the causal LM to its layers, as (owner, name, module)."""
    decoder = decoder_of(causal_lm)
    owner = causal_lm
    while owner is not decoder:
        path = next(name for name, child in owner.named_children() if _holds(child, decoder))
        yield from ((owner, name, child) for name, child in owner.named_children() if name != path)
        owner = owner.get_submodule(path)
    layers = layers_of(decoder)
    yield from ((owner, name, child) for name, child in owner.named_children() if child is not layers)


def is_embedding(module: nn.Module) -> bool:
    """Adds what depends on token or position before the first layer."""
    named = "embedding" in type(module).__name__.lower()
    return isinstance(module, nn.Embedding) or (named and not is_rotary(module))


def is_rotary(module: nn.Module) -> bool:
    """Rotary tables stand beside the layers but work within them."""
    return "rotary" in type(module).__name__.lower()


def only_layer_type(config: Any) -> str:
    """What all layers are where the configuration does not list them, as the library decides it."""
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "chunked_attention"
    return "full_attention"


def check_plan_fits(config: LayeredConfig, plan: SplitPlan) -> None:
    """A plan is made for one number of layers."""
    if plan.num_layers != config.num_hidden_layers:
        raise SplitPlanError(
            f"the plan is for {plan.num_layers} layers, the model has {config.num_hidden_layers}; "
            "make the plan with SplitPlan.for_config"
        )


def _holds(module: nn.Module, sought: nn.Module) -> bool:
    return any(each is sought for each in module.modules())
