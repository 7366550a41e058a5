"""Whether the layers of a class that nobody has proven are plain enough to be cut."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from splitlearn.errors import UnsupportedModel
from splitlearn.model.skeleton import around_the_layers, decoder_of, layers_of

PLAIN_ARGUMENTS = frozenset(
    {
        "hidden_states",
        "attention_mask",
        "position_ids",
        "position_embeddings",
        "past_key_values",
        "past_key_value",
        "layer_past",
        "use_cache",
        "output_attentions",
        "output_router_logits",
        "cache_position",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "head_mask",
        "alibi",
        "kwargs",
    }
)
"""What a layer may take: nothing that another layer made."""

_NOT_ATTENTION = re.compile("Mamba|R[Ww][Kk][Vv]|SSM|Recurr|DeltaNet|LinearAttention|Conv[123]d|LSTM")
_STANDS_AROUND = re.compile("Norm|Rotary|Embedding")


def why_not_plain(causal_lm_class: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """The first thing found that is not plain, or nothing; built on the meta device, weightless."""
    try:
        with torch.device("meta"):
            causal_lm = causal_lm_class(config)
        layers = layers_of(decoder_of(causal_lm))
    except UnsupportedModel as error:
        return error.message
    except Exception as error:
        return f"its class cannot be built from this configuration ({type(error).__name__}: {error})"
    return next(_oddities(causal_lm, list(layers), config), "")


def _oddities(causal_lm: PreTrainedModel, layers: list[nn.Module], config: PreTrainedConfig) -> Iterator[str]:
    if len(layers) != config.num_hidden_layers:
        yield f"it has {len(layers)} layers where its configuration says {config.num_hidden_layers}"
    kinds = sorted({type(layer).__name__ for layer in layers})
    if len(kinds) > 1:
        yield f"its layers are of several kinds ({', '.join(kinds)})"
    for layer in layers:
        yield from _layer_oddities(layer)
    head = causal_lm.get_output_embeddings()
    for _, name, module in around_the_layers(causal_lm):
        if module is not head and not _may_stand_around(module):
            yield f"beside its layers stands {name} ({type(module).__name__}), whose part is unknown"


def _layer_oddities(layer: nn.Module) -> Iterator[str]:
    takes = list(inspect.signature(type(layer).forward).parameters)[1:]
    if takes[:1] != ["hidden_states"]:
        yield f"its layers take {', '.join(takes[:1])} first, not hidden_states"
    unknown = sorted(set(takes) - PLAIN_ARGUMENTS)
    if unknown:
        yield f"its layers take what is not known here ({', '.join(unknown)})"
    for module in layer.modules():
        # Conv1d keeps a state between tokens; transformers' Conv1D is a linear layer.
        name = type(module).__name__
        if _NOT_ATTENTION.search(name):
            yield f"its layers hold {name}, which keeps a state of another kind than keys and values"


def _may_stand_around(module: nn.Module) -> bool:
    by_name = _STANDS_AROUND.search(type(module).__name__)
    return isinstance(module, nn.Embedding | nn.Dropout) or bool(by_name)
