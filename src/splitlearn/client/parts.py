"""What bottom and top are made of, and how each is trained: not at all, by an adapter, or in full."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from peft.tuners.lora import LoraLayer
from torch import nn

from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.errors import SettingError, UnsupportedCall

PARTS = ("bottom", "trunk", "top")
ENDS = ("bottom", "top")
LATE = ("project_out", "final_layer_norm")
"""Modules that OPT names before its layers and runs after them."""


def trunk_of(model: nn.Module) -> RemoteTrunk:
    """The remote layer of a split model, whatever wraps the model.

    Raises:
        SettingError: this is no split model.
    """
    for module in model.modules():
        if isinstance(module, RemoteTrunk):
            return module
    raise SettingError("this is no split model: load it with AutoSplitModelForCausalLM.from_pretrained")


def units_of(model: nn.Module, trunk: RemoteTrunk) -> Iterator[tuple[str, str, nn.Module]]:
    """Embeddings, layers, norm, head: ("bottom" | "top", name, module), in the whole model's order."""
    is_above = False
    for name, child in model.named_children():
        if any(module is trunk for module in child.modules()):
            for part, inner, unit in units_of(child, trunk):
                yield part, f"{name}.{inner}", unit
            is_above = True
        elif any(True for _ in child.parameters()):
            yield "top" if is_above or name in LATE else "bottom", name, child


def parts_of(model: nn.Module, trunk: RemoteTrunk) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter of the client once, in the whole model's order, as ("bottom" | "top", parameter)."""
    seen = set()
    for part, _, unit in units_of(model, trunk):
        for parameter in unit.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield part, parameter


def parameters_around(model: nn.Module, trunk: RemoteTrunk) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those that the whole model names before the trunk's and after them, each once, in its order."""
    below: list[nn.Parameter] = []
    above: list[nn.Parameter] = []
    side, seen = below, set()
    for module in model.modules():
        if module is trunk:
            side = above
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                side.append(parameter)
    return below, above


def require_parts(freeze: Collection[str], full: Collection[str]) -> None:
    """Raises SettingError where these name what is no part, contradict each other, or train nothing."""
    for name, named, parts in (("freeze", freeze, PARTS), ("full", full, ENDS)):
        if unknown := set(named) - set(parts):
            raise SettingError(
                f"{name} names {', '.join(sorted(unknown))}: the parts are {', '.join(parts)}"
                + (" (the trunk's own weights are shared, and never changed)" if "trunk" in unknown else "")
            )
    if both := set(freeze) & set(full):
        raise SettingError(f"freeze and full both name {', '.join(sorted(both))}: choose one")
    if set(freeze) == set(PARTS):
        raise SettingError("freeze names every part: leave out one to train")


def train_parts(model: nn.Module, trunk: RemoteTrunk, freeze: Collection[str], full: Collection[str]) -> None:
    """Take adapters out of what is trained in full; a weight that two parts share is frozen with either."""
    units = list(units_of(model, trunk))
    for part, name, unit in units:
        if part in full:
            _without_adapter(model, name, unit).requires_grad_(True)
    for part, _, unit in units:
        if part in freeze:
            unit.requires_grad_(False)


def units_in_full(model: nn.Module, trunk: RemoteTrunk) -> dict[str, nn.Module]:
    """By name, what is trained by more than an adapter.

    Raises:
        UnsupportedCall: one of them has an adapter as well, which a PEFT folder cannot hold.
    """
    trained = {}
    for _, name, unit in units_of(model, trunk):
        if any(weight.requires_grad for path, weight in unit.named_parameters() if "lora_" not in path):
            if any(isinstance(module, LoraLayer) for module in unit.modules()):
                raise UnsupportedCall(
                    f"{name} is trained in full and has an adapter as well, and a PEFT folder holds one of "
                    "them: load the model with full=['bottom', 'top'], or leave its own weights frozen"
                )
            trained[name] = unit
    return trained


def _without_adapter(model: nn.Module, name: str, unit: nn.Module) -> nn.Module:
    layers = {inner: each for inner, each in unit.named_modules(prefix=name) if isinstance(each, LoraLayer)}
    for inner, layer in layers.items():
        # Experts have a layer within a layer.
        if inner.rpartition(".")[0] not in layers:
            model.set_submodule(inner, layer.get_base_layer())
    return model.get_submodule(name)
