"""LoRA in a trunk: PEFT's own layers, so that names and arithmetic are PEFT's; the weights are handed in."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch
import xxhash
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import Tensor, nn

from splitlearn.errors import AdapterError, first_line
from splitlearn.model.lora_bank import PlainLora, plain_loras
from splitlearn.vocabulary import LoraSettings

ADAPTER = "default"
"""What the client's adapter is called in PEFT's layers, as PEFT calls it."""
ALL_LINEAR = "all-linear"
MAX_RANK = 1024
TYPED = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
}
HARMLESS = {
    "task_type",
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "fan_in_fan_out",
    "runtime_config",
}
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")

# ---------------------------------------------------------------- settings


def settings_of(config: LoraConfig, model_type: str) -> LoraSettings:
    """What of a PEFT configuration goes to the trunk.

    Raises:
        AdapterError: the configuration asks for more than LoRA on linear layers: some of PEFT's options
            rewrite the shared base, name token ids, or train what is not an adapter.
    """
    if type(config) is not LoraConfig:
        raise AdapterError(f"{type(config).__name__} is not LoRA as it is served: use LoraConfig")
    for name, default in _defaults():
        if name not in TYPED | HARMLESS and getattr(config, name) != default:
            raise AdapterError(
                f"LoraConfig({name}={getattr(config, name)!r}) cannot be used across the wire: leave it out"
            )
    targets = config.target_modules or DEFAULT_TARGETS.get(model_type)
    if not targets:
        raise AdapterError(
            f"PEFT has no default target_modules for {model_type}: name them, or take {ALL_LINEAR!r}"
        )
    settings = LoraSettings(
        r=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=_names(targets, "target_modules"),
        exclude_modules=_names(config.exclude_modules or (), "exclude_modules"),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        rank_pattern=dict(config.rank_pattern or {}),
        alpha_pattern=dict(config.alpha_pattern or {}),
    )
    check(settings)
    return settings


def config_of(settings: LoraSettings) -> LoraConfig:
    """The same as PEFT's configuration."""
    targets: Any = list(settings.target_modules)
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        exclude_modules=list(settings.exclude_modules) or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
    )


def check(settings: LoraSettings) -> None:
    """Raises AdapterError for a value that no adapter has, or a pattern that is more than a name."""
    ranks = (settings.r, *settings.rank_pattern.values())
    if not all(1 <= rank <= MAX_RANK for rank in ranks):
        raise AdapterError(
            f"a LoRA rank of {min(ranks)} to {max(ranks)}: it must lie between 1 and {MAX_RANK}"
        )
    if not 0 <= settings.dropout < 1:
        raise AdapterError(f"lora_dropout is {settings.dropout}: it must be at least 0 and below 1")
    if not all(map(math.isfinite, (settings.alpha, *settings.alpha_pattern.values()))):
        raise AdapterError("lora_alpha must be a finite number")
    # PEFT reads the patterns' keys as regular expressions, which a stranger may not bring.
    for name in (
        *settings.target_modules,
        *settings.exclude_modules,
        *settings.rank_pattern,
        *settings.alpha_pattern,
    ):
        if not PLAIN_NAME.fullmatch(name):
            raise AdapterError(f"{name[:80]!r} is no module's name: give names, or parts of them after a dot")


def _names(told: Any, field: str) -> tuple[str, ...]:
    if told == ALL_LINEAR:
        return (ALL_LINEAR,)
    if isinstance(told, str):
        raise AdapterError(f"{field}={told!r} is a regular expression: give a list of module names instead")
    return tuple(sorted(told))


def _defaults() -> Iterator[tuple[str, Any]]:
    for field in fields(LoraConfig):
        if field.default is not MISSING:
            yield field.name, field.default
        elif field.default_factory is not MISSING:
            yield field.name, field.default_factory()


# ---------------------------------------------------------------- weights


def add_lora(model: nn.Module, settings: LoraSettings, adapter: str, seed: int) -> None:
    """Put an adapter into the model, its weights drawn from the seed and each weight's own name.

    So they do not depend on where the model is cut. Everything else is frozen, as PEFT does it.

    Raises:
        AdapterError: no module has one of the target names.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            inject_adapter_in_model(config_of(settings), model, adapter)
        except (ValueError, TypeError, AttributeError) as error:
            remove_lora(model, adapter)
            raise AdapterError(f"LoRA cannot be added: {first_line(error)}") from None
    # In float32 beside a base in half precision, as PEFT trains it.
    cast_adapter_dtype(model, adapter)
    for layer in lora_layers(model):
        layer.train(model.training)
    draw(weights_of(model, adapter), seed)


def remove_lora(model: nn.Module, adapter: str) -> None:
    """Take an adapter out of the model, all of it or what there is of one that could not be added."""
    getattr(model, "peft_config", {}).pop(adapter, None)
    for layer in lora_layers(model):
        if adapter in layer._all_available_adapter_names():
            layer.delete_adapter(adapter)


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@torch.no_grad()
def draw(weights: Mapping[str, Tensor], seed: int) -> None:
    """PEFT's initialisation: A uniform after Kaiming, B zero, so that the adapter starts by doing nothing."""
    for name, weight in weights.items():
        if "lora_A" in name:
            drawn = torch.empty(weight.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=_generator(seed, name))
            weight.copy_(drawn)
        elif "lora_embedding_B" in name:
            weight.copy_(torch.randn(weight.shape, generator=_generator(seed, name)))


def weights_of(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The adapter's weights by the names that PEFT gives them in a file, less its prefix."""
    marker = f".{adapter}"
    return {
        file_name(name, adapter): weight
        for name, weight in model.named_parameters()
        if "lora_" in name and (f"{marker}." in name or name.endswith(marker))
    }


def file_name(name: str, adapter: str) -> str:
    """`model.layers.2.self_attn.q_proj.lora_A.default.weight` -> `...q_proj.lora_A.weight`."""
    name = f"{name}.".replace(f".{adapter}.", ".").removesuffix(".")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(name.encode(), seed=seed) >> 1)


# ---------------------------------------------------------------- several adapters on one trunk


class LoraSlots:
    """PEFT's layers in one model, in which one adapter at a time is bound, at one version of its weights.

    Nothing is copied: the layers compute with the very tensors that were handed in. So a graph keeps the
    version that it was built with, whatever is bound afterwards. The layers of an adapter that is not bound
    hold nothing: its memory is that of the tensors themselves.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: list[LoraLayer] = []
        self._places: dict[str, dict[str, tuple[nn.Module, str]]] = {}
        self._plain: dict[str, dict[str, PlainLora] | None] = {}
        self._active: str | None = None
        self._bound: Mapping[str, Tensor] | None = None

    def __contains__(self, slot: object) -> bool:
        return slot in self._places

    def plain(self, slot: str) -> dict[str, PlainLora] | None:
        """An adapter's layers by their names; None where it is gone, or more than plain LoRA."""
        return self._plain.get(slot)

    def add(self, slot: str, settings: LoraSettings, seed: int) -> dict[str, Tensor]:
        """Make room for an adapter; its first weights in float32, by name.

        Raises:
            AdapterError: no module of this trunk has one of the target names.
        """
        add_lora(self._model, settings, slot, seed)
        self._layers = lora_layers(self._model)
        self._places[slot] = dict(_places(self._model, slot))
        self._plain[slot] = plain_loras(self._model, slot)
        weights = weights_of(self._model, slot)
        drawn = {name: weights[name].detach().to(torch.float32) for name in self._places[slot]}
        self._activate(None)
        self._empty(slot)
        return drawn

    def remove(self, slot: str) -> None:
        """Free an adapter's layers; versions of its weights that are still held stay what they are."""
        self._activate(None)
        del self._places[slot], self._plain[slot]
        remove_lora(self._model, slot)

    def bind(self, slot: str | None, weights: Mapping[str, Tensor] | None = None) -> None:
        """Compute with this adapter from now on; None is the bare base.

        Raises:
            AdapterError: the adapter has been removed.
        """
        if slot is not None and slot not in self._places:
            raise AdapterError("the adapter was unloaded, or its run closed: open another session")
        if slot != self._active:
            self._activate(slot)
        if slot is None or weights is None or weights is self._bound:
            return
        for name, (owner, key) in self._places[slot].items():
            owner._parameters[key] = weights[name]  # type: ignore[assignment]
        self._bound = weights

    def _empty(self, slot: str) -> None:
        for owner, key in self._places[slot].values():
            owner._parameters[key] = None

    def _activate(self, slot: str | None) -> None:
        if self._active in self._places and self._bound is not None:
            self._empty(self._active)
        for layer in self._layers:
            layer._active_adapter = [] if slot is None else [slot]
        self._active, self._bound = slot, None


def _places(model: nn.Module, slot: str) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Where each weight of an adapter hangs."""
    names = {id(weight): name for name, weight in weights_of(model, slot).items()}
    for module in model.modules():
        for key, weight in module.named_parameters(recurse=False):
            if id(weight) in names:
                yield names[id(weight)], (module, key)
