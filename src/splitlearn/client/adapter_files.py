"""The whole model's adapter as one PEFT folder: bottom and top from here, the trunk's part over the wire."""

from __future__ import annotations

import secrets
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.errors import AdapterError, UnsupportedCall
from splitlearn.model.lora import ADAPTER, config_of, settings_of, weights_of
from splitlearn.wire.messages import AdapterMessage

PREFIX = "base_model.model."


def read_config(folder: Path) -> LoraConfig:
    """Raises AdapterError where the folder holds no LoRA adapter in PEFT's format."""
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"{folder} holds no PEFT adapter ({str(error).splitlines()[0]}): give the folder with "
            "adapter_config.json and adapter_model.safetensors"
        ) from None
    # What it was trained on is not what it is loaded onto, nor is it finished.
    config.inference_mode = False
    return config


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
    weights, ours = read_weights(folder), weights_of(model, ADAPTER)
    if missing := ours.keys() - weights.keys():
        raise AdapterError(
            f"{folder} lacks {len(missing)} of the weights of bottom and top, first {min(missing)}"
        )
    with torch.no_grad():
        for name, weight in ours.items():
            if weights[name].shape != weight.shape:
                raise AdapterError(
                    f"{folder}: {name} has shape {list(weights[name].shape)}, this model needs "
                    f"{list(weight.shape)}"
                )
            weight.copy_(weights[name])
    theirs = {name: weight for name, weight in weights.items() if name not in ours}
    lora = settings_of(read_config(folder), model.config.model_type)
    trunk.start_from(AdapterMessage(f"start-{secrets.token_hex(8)}", 0, lora, theirs))


def adapter_weights(model: PreTrainedModel, trunk: RemoteTrunk) -> dict[str, Tensor]:
    """The whole model's adapter as it is now, on the CPU, by the names in a PEFT file less the prefix.

    Raises:
        UnsupportedCall: the model has no adapter; AccessDenied: the run keeps the trunk's part.
    """
    ours = {name: weight.detach().cpu().clone() for name, weight in weights_of(model, ADAPTER).items()}
    if not ours:
        raise UnsupportedCall("this model has no adapter: load it with lora=LoraConfig(...)")
    if trunk.run.settings.lora.r:
        ours |= trunk.transport.download_adapter(trunk.run.name).weights
    return ours


def save_adapter(model: PreTrainedModel, trunk: RemoteTrunk, folder: Path) -> None:
    """Write one folder that `PeftModel.from_pretrained` loads onto the whole model.

    A frozen trunk has no part in it: the folder's configuration names the layers that do.
    """
    weights = adapter_weights(model, trunk)
    folder.mkdir(parents=True, exist_ok=True)
    named = {PREFIX + name: weight.contiguous() for name, weight in weights.items()}
    save_file(named, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    _config_to_save(model, trunk).save_pretrained(str(folder))


def _config_to_save(model: PreTrainedModel, trunk: RemoteTrunk) -> LoraConfig:
    # As it was asked for: PEFT has since put this side's own module names in its place.
    config = config_of(trunk.lora)
    if not trunk.run.settings.lora.r:
        layers = range(model.config.num_hidden_layers)
        # Which PEFT takes with a list of names only.
        config.target_modules = set(model.peft_config[ADAPTER].target_modules)
        config.layers_to_transform = [layer for layer in layers if layer not in trunk.layers]
    config.base_model_name_or_path = model.name_or_path
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True
    return config
