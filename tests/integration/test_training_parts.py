"""Bottom and top trained in full, or parts frozen: exactly what changes in the whole model changes here."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from splitlearn import AutoSplitModelForCausalLM, SplitTrainer, TrunkServer
from splitlearn.cli.adapter_export import Adapter
from splitlearn.client.training import clip_grad_norm
from splitlearn.errors import AdapterError, CheckpointError, SettingError, UnsupportedCall
from splitlearn.model.lora import ADAPTER, draw, weights_of
from splitlearn.testing.tiny import tiny_model, tiny_whole

pytestmark = pytest.mark.timeout(240)

SEED, STEPS, CLIP = 7, 20, 0.03
ENDS = ["bottom", "top"]
NO_DROPOUT: dict[str, dict[str, float]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}
IDS = torch.randint(4, 100, (42, 12), generator=torch.Generator().manual_seed(1))
DATA = [{"input_ids": row, "labels": row} for row in IDS]
LAYER = r".*\.(layers|h)\.({})\..*"
OF_PART = {
    "bottom": rf"{LAYER.format('0|1')}|(.*\.)?(embed_tokens|embed_positions|wte|wpe|project_in)(\..*)?",
    "trunk": LAYER.format("2|3"),
    "top": rf"{LAYER.format('4|5')}|([a-z]+\.)*(norm|ln_f|final_layer_norm|project_out|lm_head)(\..*)?",
}
"""Names of tiny models' modules and weights, whose layers are cut 2/2/2."""
Weights = dict[str, Tensor]


def lora(**how: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | how))


def not_experts(family: str) -> LoraConfig:
    """PEFT's file cannot say of experts in which layers they have an adapter."""
    return lora(target_modules=["q_proj", "v_proj"]) if family == "mixtral" else lora()


def arguments(folder: Path, **how: Any) -> TrainingArguments:
    told = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(str(folder), **(told | how))


@pytest.fixture
def model_of(tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: tiny_model(family, tmp_path / "model", **NO_DROPOUT.get(family, {}))


@pytest.fixture
def serve(tmp_path: Path) -> Callable[[Path], AbstractContextManager[TrunkServer]]:
    def served(folder: Path) -> TrunkServer:
        sessions = {"session_tokens": 64, "kv_budget_bytes": 1 << 24}
        return TrunkServer(folder, port=0, device="cpu", sessions=sessions, state_dir=tmp_path / "state")

    return served


@contextmanager
def loaded(folder: Path, server: TrunkServer, **how: Any) -> Iterator[Any]:
    how = {"lora": lora(), "seed": SEED} | how
    model = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=server.address, **how)
    try:
        yield model
    finally:
        model.close()


def is_in(parts: Sequence[str], names: Sequence[str]) -> bool:
    return any(re.fullmatch(OF_PART[part], name) for part in parts for name in names)


def whole_of(folder: Path, config: LoraConfig, full: Sequence[str] = (), freeze: Sequence[str] = ()) -> Any:
    """PEFT's LoRA where nothing is trained in full, and `requires_grad` by each weight's names."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    excluded = "|".join(OF_PART[part] for part in full) or None
    inject_adapter_in_model(replace(config, exclude_modules=excluded), whole, ADAPTER)
    cast_adapter_dtype(whole, ADAPTER)
    draw(weights_of(whole, ADAPTER), SEED)
    names: dict[int, list[str]] = {}
    for name, weight in whole.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    for weight in whole.parameters():
        its = names[id(weight)]
        is_trained = "lora_" in its[0] or is_in(full, its)
        weight.requires_grad_(is_trained and not is_in(freeze, its))
    return whole


def trained_in(model: Any) -> Weights:
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def trunks(model: Any) -> Weights:
    """The trunk's part of the adapter, by the names of the model's parameters."""
    theirs = {name: each for name, each in model.adapter_weights().items() if is_in(["trunk"], [name])}
    return {name.replace(".weight", f".{ADAPTER}.weight"): each for name, each in theirs.items()}


def same(ours: Weights, theirs: Weights) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def logs(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS[:2], use_cache=False).logits


# ---------------------------------------------------------------- exactly


FULL = [(family, {"full": ENDS}) for family in ("llama", "qwen3", "mixtral", "gpt2", "gemma2", "opt")]
APART = [
    ("llama", {"full": ["bottom"]}),
    ("llama", {"full": ["top"]}),
    ("llama", {"full": ["bottom"], "freeze": ["trunk"]}),
    ("opt", {"full": ["top"]}),
    ("gpt2", {"full": ["top"], "freeze": ["bottom"]}),
    ("llama", {"freeze": ["bottom"]}),
    ("llama", {"freeze": ["top"]}),
    ("llama", {"freeze": ["trunk"]}),
    ("opt", {"freeze": ["bottom"]}),
]


@pytest.mark.parametrize(("family", "how"), FULL + APART, ids=str)
def test_twenty_steps_are_those_of_the_whole_model_bit_for_bit(
    family: str, how: dict[str, list[str]], tmp_path: Path, model_of, serve
) -> None:
    """gpt2, gemma2 and opt have one weight for embeddings and head."""
    folder, config = model_of(family), not_experts(family)
    whole = whole_of(folder, config, **how)
    first = trained_in(whole)
    theirs = Trainer(whole, arguments(tmp_path / "a"), train_dataset=DATA)
    theirs.train()
    with serve(folder) as server, loaded(folder, server, lora=config, **how) as model:
        ours = SplitTrainer(model, arguments(tmp_path / "b"), train_dataset=DATA)
        ours.train()
        for key in ("loss", "grad_norm"):
            assert logs(ours, key) == logs(theirs, key), key
        assert same(trained_in(model) | trunks(model), trained_in(whole))
        assert max(logs(ours, "grad_norm")) > CLIP, "or nothing was clipped"
    changed = {name for name, weight in trained_in(whole).items() if not torch.equal(weight, first[name])}
    assert changed == first.keys()


def test_half_precision_weights_beside_a_float32_adapter_are_clipped_as_torch_clips_them(
    tmp_path: Path, model_of, serve
) -> None:
    """It takes the norms by precision."""
    tiny_whole(model_of("llama"), dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    whole = whole_of(tmp_path / "half", lora(), ENDS)
    theirs = Trainer(whole, arguments(tmp_path / "a"), train_dataset=DATA)
    theirs.train()
    with serve(tmp_path / "half") as server, loaded(tmp_path / "half", server, full=ENDS) as model:
        ours = SplitTrainer(model, arguments(tmp_path / "b"), train_dataset=DATA)
        ours.train()
        assert logs(ours, "grad_norm") == logs(theirs, "grad_norm")
        assert same(trained_in(model) | trunks(model), trained_in(whole))
    assert {weight.dtype for weight in trained_in(whole).values()} == {torch.bfloat16, torch.float32}


def test_clipping_the_trunk_by_its_own_norm_is_another_training(tmp_path: Path, model_of, serve) -> None:
    """The control of the equality above."""

    class Apart(SplitTrainer):
        def _clip(self, model: Any, max_norm: float) -> Tensor:
            norms = self._trunk.grad_norms()
            total = clip_grad_norm(model, max_norm)
            self._trunk.gradient_scale = min(1.0, max_norm / float(torch.linalg.vector_norm(norms)))
            return total

    folder = model_of("llama")
    whole = whole_of(folder, lora(), ENDS)
    Trainer(whole, arguments(tmp_path / "a"), train_dataset=DATA).train()
    with serve(folder) as server, loaded(folder, server, full=ENDS) as model:
        Apart(model, arguments(tmp_path / "b"), train_dataset=DATA).train()
        apart, expected = trained_in(model), trained_in(whole)
    assert any((apart[name] - expected[name]).abs().max() > 1e-4 for name in apart)


def test_without_lora_all_that_is_not_frozen_is_trained_in_full(tmp_path: Path, model_of, serve) -> None:
    folder = model_of("llama")
    how = {"lora": None, "freeze": ["trunk"]}
    with serve(folder) as server:
        with loaded(folder, server, **how) as model:
            names = set(trained_in(model))
        with loaded(folder, server, full=ENDS, **how) as model:
            assert set(trained_in(model)) == names == set(dict(model.named_parameters()))


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("llama", {"full": ENDS}),
        ("gpt2", {"full": ENDS}),
        ("gemma2", {"full": ["top"]}),
        ("opt", {"full": ["top"], "freeze": ["bottom"]}),
        ("mixtral", {"full": ["bottom"]}),
        ("llama", {"full": ["top"], "freeze": ["trunk"]}),
        ("llama", {"lora": None, "freeze": ["trunk"]}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*tie")
def test_peft_loads_what_was_written_and_gives_the_same_logits(
    family: str, how: dict[str, Any], tmp_path: Path, model_of, serve
) -> None:
    folder, out = model_of(family), tmp_path / "adapter"
    how = {"lora": not_experts(family)} | how
    with serve(folder) as server:
        with loaded(folder, server, **how) as model:
            SplitTrainer(model, arguments(tmp_path / "a", max_steps=3), train_dataset=DATA).train()
            model.save_adapter(out)
            expected = logits(model)
        with loaded(folder, server, **(how | {"lora": out})) as model:
            assert torch.equal(logits(model), expected), "and it can be gone on from"
    bare = tiny_whole(folder)
    assert not torch.allclose(logits(bare), expected, atol=1e-3)
    assert torch.allclose(logits(PeftModel.from_pretrained(bare, out)), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_it_is_a_model_of_its_own(family: str, tmp_path: Path, model_of, serve, monkeypatch) -> None:
    folder, out = model_of(family), tmp_path / "adapter"
    monkeypatch.setattr("splitlearn.cli.adapter_export.load_tokenizer", lambda _: _NoTokenizer())
    with serve(folder) as server, loaded(folder, server, full=ENDS) as model:
        SplitTrainer(model, arguments(tmp_path / "a", max_steps=3), train_dataset=DATA).train()
        model.save_adapter(out)
        expected = logits(model)
    adapter = Adapter.find(out, None)
    adapter.require_fitting()
    adapter.merge_into(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), expected, atol=1e-5)


class _NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """Tiny models have none."""


def test_what_was_trained_in_full_is_gone_on_from_in_full(tmp_path: Path, model_of, serve) -> None:
    folder, out = model_of("llama"), tmp_path / "adapter"
    with serve(folder) as server:
        with loaded(folder, server, full=ENDS) as model:
            model.save_adapter(out)
        with pytest.raises(AdapterError, match="full="):
            loaded(folder, server, lora=out).__enter__()
        with loaded(folder, server, freeze=["trunk"]) as model:
            model.save_adapter(out)
        with pytest.raises(AdapterError, match="freeze="):
            loaded(folder, server, lora=out).__enter__()
        with loaded(folder, server) as model:
            model.save_adapter(out)
        with pytest.raises(AdapterError, match="full="):
            loaded(folder, server, lora=out, full=ENDS).__enter__()


def test_an_adapter_within_what_is_trained_in_full_is_not_written(tmp_path: Path, model_of, serve) -> None:
    folder = model_of("llama")
    with serve(folder) as server, loaded(folder, server) as model:
        model.model.layers[0].requires_grad_(True)
        with pytest.raises(UnsupportedCall, match="full="):
            model.save_adapter(tmp_path / "adapter")


# ---------------------------------------------------------------- checkpoints


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 10:
            raise KeyboardInterrupt


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_after_both_sides_ended_the_run_goes_on_bit_for_bit(
    family: str, tmp_path: Path, model_of, serve
) -> None:
    folder, how = model_of(family), {"full": ENDS, "lora": lora(lora_dropout=0.2)}
    with serve(folder) as server, loaded(folder, server, **how) as model:
        SplitTrainer(model, arguments(tmp_path / "undisturbed"), train_dataset=DATA).train()
        undisturbed = model.adapter_weights()
    told = arguments(tmp_path / "out", save_strategy="steps", save_steps=4)
    with serve(folder) as server, loaded(folder, server, run="notes", **how) as model:
        trainer = SplitTrainer(model, told, train_dataset=DATA, callbacks=[StopAt()])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    with serve(folder) as server:
        with loaded(folder, server, run="notes", **how) as model:
            SplitTrainer(model, told, train_dataset=DATA).train(resume_from_checkpoint=True)
            assert same(model.adapter_weights(), undisturbed)
        with (
            loaded(folder, server, run="notes", **(how | {"full": ["top"]})) as model,
            pytest.raises(CheckpointError, match="in full"),
        ):
            SplitTrainer(model, told, train_dataset=DATA).train(resume_from_checkpoint=True)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("how", [{"full": ["top"]}, {"freeze": ["trunk"]}], ids=str)
def test_adapters_of_experts_that_peft_would_load_into_all_layers_are_refused(how, model_of, serve) -> None:
    folder = model_of("mixtral")
    with serve(folder) as server, pytest.raises(AdapterError, match="target_modules"):
        loaded(folder, server, **how).__enter__()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"full": ["trunk"]}, "never changed"),
        ({"full": ["head"]}, "bottom, top"),
        ({"full": ["top"], "freeze": ["top"]}, "both name top"),
        ({"full": ["top"], "lora": None}, "LoraConfig"),
        ({"full": ["top"], "lora": None, "freeze": ["trunk"]}, "says nothing of bottom"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(how: dict[str, Any], told: str, model_of, serve) -> None:
    folder = model_of("llama")
    with serve(folder) as server, pytest.raises(SettingError, match=told):
        loaded(folder, server, **how).__enter__()
