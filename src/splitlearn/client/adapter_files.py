"""The whole model's adapter as one PEFT folder: bottom and top from here, the trunk's part over the wire."""

from __future__ import annotations

import secrets
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from splitlearn.client.parts import units_in_full
from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.errors import AdapterError, UnsupportedCall, first_line
from splitlearn.model.lora import ADAPTER, config_of, weights_of
from splitlearn.wire.messages import AdapterMessage

PREFIX = "base_model.model."


def read_config(folder: Path) -> LoraConfig:
    """Raises AdapterError where the folder holds no LoRA adapter in PEFT's format."""
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"{folder} holds no PEFT adapter ({first_line(error)}): give the folder with "
            "adapter_config.json and adapter_model.safetensors"
        ) from None
    # What it was trained on is not what it is loaded onto, nor is it finished.
    config.inference_mode = False
    return config


def lora_of(folder: Path) -> LoraConfig | None:
    """What of the adapter is LoRA; None where it has nothing but weights that were trained in full.

    Raises:
        AdapterError: the folder holds no LoRA adapter in PEFT's format.
    """
    config = read_config(folder)
    # Which layers they are follows from the parts that are named again.
    config.modules_to_save = config.layers_to_transform = None
    return None if config.target_modules == DUMMY_TARGET_MODULES else config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """By their names in the file, less PEFT's prefix."""
    try:
        weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (OSError, SafetensorError):
        raise AdapterError(
            f"{folder} has no readable {SAFETENSORS_WEIGHTS_NAME}; pickled .bin adapters are not read"
        ) from None
    return {name.removeprefix(PREFIX): weight for name, weight in weights.items()}


def start_from(model: PreTrainedModel, trunk: RemoteTrunk, folder: Path) -> None:
    """Take bottom's and top's weights from the folder, and let the run start from the trunk's.

    Raises:
        AdapterError: the adapter is of another model, or lacks a part of it.
    """
    weights, ours = read_weights(folder), _trained_here(model, trunk)
    if missing := ours.keys() - weights.keys():
        raise AdapterError(
            f"{folder} lacks {len(missing)} of the weights of bottom and top, first {min(missing)}: name "
            "in full= the parts that were trained in full, and no other"
        )
    theirs = {name: weight for name, weight in weights.items() if name not in ours}
    if whole := [name for name in theirs if "lora_" not in name]:
        raise AdapterError(
            f"{folder} was trained in full in part, and has {min(whole)}: name that part in full="
        )
    if not theirs and trunk.planned is not None and trunk.planned.settings.lora.r:
        raise AdapterError(f"{folder} has no adapter for the trunk: load it with freeze=['trunk']")
    with torch.no_grad():
        for name, weight in ours.items():
            if weights[name].shape != weight.shape:
                raise AdapterError(
                    f"{folder}: {name} has shape {list(weights[name].shape)}, this model needs "
                    f"{list(weight.shape)}"
                )
            weight.copy_(weights[name])
    trunk.start_from(AdapterMessage(f"start-{secrets.token_hex(8)}", 0, trunk.lora, theirs))


def _trained_here(model: PreTrainedModel, trunk: RemoteTrunk) -> dict[str, Tensor]:
    """Adapter and what is trained in full, by the names in a PEFT file less the prefix."""
    whole = {
        f"{name}.{key}": weight
        for name, unit in units_in_full(model, trunk).items()
        for key, weight in unit.state_dict().items()
    }
    return weights_of(model, ADAPTER) | whole


def adapter_weights(model: PreTrainedModel, trunk: RemoteTrunk) -> dict[str, Tensor]:
    """The whole model's adapter as it is now, on the CPU, by the names in a PEFT file less the prefix.

    Raises:
        UnsupportedCall: the model is not trained; AccessDenied: the run keeps the trunk's part.
    """
    if trunk.planned is None:
        raise UnsupportedCall("this model has no adapter: load it with lora=LoraConfig(...)")
    ours = {
        name: weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, weight in _trained_here(model, trunk).items()
    }
    if trunk.run.settings.lora.r:
        ours |= trunk.transport.download_adapter(trunk.run.name).weights
    return ours if trunk.own_ends is None else trunk.own_ends.folded(ours)


def save_adapter(model: PreTrainedModel, trunk: RemoteTrunk, folder: Path) -> None:
    """Write one folder that `PeftModel.from_pretrained` loads onto the whole model.

    A frozen trunk has no part in it: the folder's configuration names the layers that do. What is
    trained in full is there as it is, and named in `modules_to_save`. What averages added to the base of a
    module ("fedex") is folded in, as further rank of its adapter.
    """
    weights = adapter_weights(model, trunk)
    folder.mkdir(parents=True, exist_ok=True)
    named = {PREFIX + name: weight.contiguous() for name, weight in weights.items()}
    save_file(named, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    _config_to_save(model, trunk).save_pretrained(str(folder))


def _config_to_save(model: PreTrainedModel, trunk: RemoteTrunk) -> LoraConfig:
    if trunk.run.settings.lora.r:
        # As it was asked for: PEFT has since put this side's own module names in its place.
        config = config_of(trunk.lora)
    elif weights_of(model, ADAPTER):
        config = config_of(trunk.lora)
        layers = range(model.config.num_hidden_layers)
        # Which PEFT takes with a list of names only.
        config.target_modules = set(model.peft_config[ADAPTER].target_modules)
        config.layers_to_transform = [layer for layer in layers if layer not in trunk.layers]
    else:
        config = LoraConfig(target_modules=DUMMY_TARGET_MODULES)
    if trunk.own_ends is not None:
        trunk.own_ends.fold(config)
    # PEFT puts no adapter into these.
    config.modules_to_save = list(units_in_full(model, trunk)) or None
    config.base_model_name_or_path = model.name_or_path
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True
    return config
