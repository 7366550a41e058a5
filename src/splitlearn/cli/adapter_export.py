"""A PEFT adapter on disk: found, held against its model, copied or merged into it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from splitlearn.cli.fine_tuning import ADAPTER
from splitlearn.cli.text import load_tokenizer
from splitlearn.cli.whole_model import load_whole
from splitlearn.client.adapter_files import PREFIX, read_config, read_weights
from splitlearn.errors import AdapterError
from splitlearn.model.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Adapter:
    """The folder of an adapter, and the model that it belongs to."""

    folder: Path
    model: str

    @classmethod
    def find(cls, folder: Path, model: str | None) -> Adapter:
        """The adapter that is in `train`'s output, or the folder's own.

        Raises:
            AdapterError: there is none, or it does not say of which model it is.
        """
        inner = folder / ADAPTER
        found = inner if (inner / CONFIG_NAME).is_file() else folder
        if not (found / CONFIG_NAME).is_file():
            raise AdapterError(
                f"{folder} has no adapter: give the output of a `splitlearn train` that has ended, "
                f"or a folder with {CONFIG_NAME}"
            )
        base = model or read_config(found).base_model_name_or_path
        if not base:
            raise AdapterError(f"{found} does not say which model it belongs to: name it with --model")
        return cls(found, str(base))

    def require_fitting(self) -> None:
        """Raises AdapterError unless the file has each weight of this adapter on this model, and no other."""
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(Checkpoint.open(self.model).config)
            adapted = get_peft_model(whole, read_config(self.folder))
        wanted = {
            name.removeprefix(PREFIX): weight.shape
            for name, weight in get_peft_model_state_dict(adapted).items()
        }
        found = {name: weight.shape for name, weight in read_weights(self.folder).items()}
        self._require_none(wanted.keys() - found.keys(), "lacks {} weights of this adapter on {}")
        self._require_none(
            found.keys() - wanted.keys(), "has {} weights that no adapter of this kind has on {}"
        )
        for name in sorted(wanted):
            if wanted[name] != found[name]:
                raise AdapterError(
                    f"{self.folder}: {name} has shape {list(found[name])}, {self.model} needs "
                    f"{list(wanted[name])}: name the model that it was trained on with --model"
                )

    def _require_none(self, names: Set[str], told: str) -> None:
        if names:
            raise AdapterError(
                f"{self.folder} {told.format(len(names), self.model)}, first {min(names)}: "
                "name the model that it was trained on with --model"
            )

    def copy_into(self, output: Path) -> None:
        """Configuration and weights, which `PeftModel.from_pretrained` loads onto the whole model."""
        config = read_config(self.folder)
        config.base_model_name_or_path, config.inference_mode = self.model, True
        config.save_pretrained(str(output))
        weights = {PREFIX + name: weight for name, weight in read_weights(self.folder).items()}
        save_file(weights, output / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    def merge_into(self, output: Path) -> None:
        """The whole model, in its own precision, the adapter added to its weights; and its tokenizer.

        Raises:
            AdapterError: a merged weight would not be finite.
        """
        adapted = PeftModel.from_pretrained(load_whole(self.model), str(self.folder))
        try:
            merged = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise AdapterError(f"{self.folder} cannot be merged: {error}") from None
        merged.save_pretrained(output)
        load_tokenizer(self.model).save_pretrained(output)
