"""Clients with different adapters generate in one batch, and each writes what PEFT writes with its own."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from splitlearn import AutoSplitModelForCausalLM
from splitlearn.testing.pair import lively_model, meeting, served_pair
from splitlearn.testing.parity import Text, distance, write
from splitlearn.testing.tiny import tiny_whole

pytestmark = pytest.mark.slow
CLOSE = 5e-5
"""As for decode steps at fixed shapes: these models are lively."""
FEW = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "phi3": ["qkv_proj"]}
IDS = {
    name: torch.randint(4, 128, (1, 6 + n), generator=torch.Generator().manual_seed(n))
    for n, name in enumerate(("few", "all", ""))
}


def adapters(family: str, folder: Path, model: Path) -> dict[str, Path]:
    """Folders as PEFT saves them, with weights that change every token."""
    configs = {
        "few": LoraConfig(r=3, lora_alpha=1, use_rslora=True, target_modules=FEW[family]),
        "all": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    }
    for seed, (name, config) in enumerate(configs.items()):
        whole = get_peft_model(tiny_whole(model), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in whole.parameters():
                if weight.requires_grad:
                    weight.normal_()
        whole.save_pretrained(folder / name)
    return {name: folder / name for name in configs}


def written_by_peft(model: Path, adapter: Path | None, name: str, device: str) -> Text:
    whole: Any = tiny_whole(model).to(device)
    if adapter is not None:
        whole = PeftModel.from_pretrained(whole, adapter).eval()
    whole.generation_config.eos_token_id = None
    return write(whole, IDS[name], torch.ones_like(IDS[name]))


@contextmanager
def client(model: Path, address: str, adapter: Path | None, device: str) -> Iterator[PreTrainedModel]:
    split = AutoSplitModelForCausalLM.from_pretrained(model, trunk=address, lora=adapter, device=device)
    split.eval()
    split.generation_config.eos_token_id = None
    try:
        yield split
    finally:
        split.close()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("compile", ["off", "default"])
@pytest.mark.parametrize("family", FEW)
def test_each_client_writes_what_its_adapter_writes(
    family: str, compile: str, device: str, tmp_path: Path
) -> None:
    model = lively_model(family, tmp_path / "model")
    folders: dict[str, Path | None] = {**adapters(family, tmp_path, model), "": None}
    expected = {name: written_by_peft(model, folder, name, device) for name, folder in folders.items()}

    def generate(name: str) -> Text:
        with client(model, pair.server.address, folders[name], device) as split:
            return write(split, IDS[name], torch.ones_like(IDS[name]))

    with served_pair(model, device=device, compile=compile, state_dir=tmp_path / "state") as pair:
        with meeting(pair.engine, len(IDS)), ThreadPoolExecutor(len(IDS)) as threads:
            found = dict(zip(IDS, threads.map(generate, IDS), strict=True))
        assert pair.engine.ran.mixed >= 19
        if compile == "default":
            assert pair.engine.graphs.banked_first_steps.proven
    for name, text in found.items():
        assert torch.equal(text.ids_BT, expected[name].ids_BT), name
        assert distance(expected[name].logits, text.logits).relative <= CLOSE, name
    assert len({tuple(text.ids_BT[0, -8:].tolist()) for text in found.values()}) == len(IDS)
