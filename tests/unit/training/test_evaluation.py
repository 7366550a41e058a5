"""The held-out loss counts each learned token once, however they lie in batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from splitlearn import AutoSplitModelForCausalLM, TokenWeightedEvaluation, TrunkServer, held_out_loss
from splitlearn.errors import DataError, SettingError
from splitlearn.testing.tiny import tiny_model, tiny_whole
from splitlearn.training.batches import PaddedBatch
from splitlearn.training.tokens import IGNORED

LENGTHS = [3, 17, 4, 9, 30, 5, 12]
collate = PaddedBatch(pad_token_id=0)


def example(tokens: int) -> dict[str, list[int]]:
    """The longer the text, the fewer of its tokens are learned: batches' means weigh them all wrong."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(4, 100, (tokens,), generator=generator).tolist()
    not_learned = max(1, tokens - 34 // tokens)
    return {"input_ids": ids, "labels": [IGNORED] * not_learned + ids[not_learned:]}


DATA = [example(tokens) for tokens in LENGTHS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    """Its head is livelier than a new model's, whose losses are all alike."""
    model = tiny_whole(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    return model


def batches(size: int) -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=size, collate_fn=collate)  # type: ignore[arg-type]


@torch.no_grad()
def by_hand(model: Any) -> float:
    """Each text alone, each of its terms by itself."""
    terms = []
    for each in DATA:
        logits = model(torch.tensor([each["input_ids"]])).logits[0, :-1]
        loss = cross_entropy(logits, torch.tensor(each["labels"][1:]), reduction="none")
        terms += [
            float(term) for term, label in zip(loss, each["labels"][1:], strict=True) if label != IGNORED
        ]
    return sum(terms) / len(terms)


def evaluated(kind: type, model: Any, size: int, folder: Path) -> float:
    args = TrainingArguments(
        str(folder), per_device_eval_batch_size=size, use_cpu=True, disable_tqdm=True, report_to=[]
    )
    return kind(model=model, args=args, eval_dataset=DATA, data_collator=collate).evaluate()["eval_loss"]


class WeightedTrainer(TokenWeightedEvaluation, Trainer):
    pass


def test_the_mean_over_tokens_does_not_depend_on_the_batch_size(whole: Any) -> None:
    expected = by_hand(whole)
    for size in range(1, len(DATA) + 1):
        assert held_out_loss(whole, batches(size)) == pytest.approx(expected, rel=1e-6)


def test_a_mean_of_the_batches_means_does(whole: Any, tmp_path: Path) -> None:
    """The control of the test above, and why the library's number is not taken."""
    found = [evaluated(Trainer, whole, size, tmp_path) for size in (1, 2, 3)]
    assert max(found) > 1.01 * min(found)
    assert all(loss != pytest.approx(by_hand(whole), rel=1e-3) for loss in found)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_trainer_evaluates_by_the_token_too(whole: Any, size: int, tmp_path: Path) -> None:
    assert evaluated(WeightedTrainer, whole, size, tmp_path) == pytest.approx(by_hand(whole), rel=1e-6)


@pytest.mark.parametrize("several", ["world_size", "n_gpu"])
def test_several_processes_or_devices_are_refused_before_anything_runs(
    whole: Any, several: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They pad the last batches with examples that were counted already."""
    monkeypatch.setattr(TrainingArguments, several, 2)
    with pytest.raises(SettingError, match=r"one process on one device, here are .*2 .*held_out_loss"):
        evaluated(WeightedTrainer, whole, 2, tmp_path)


def test_the_split_models_is_the_whole_models(folder: Path) -> None:
    with TrunkServer(folder, port=0, device="cpu", sessions={"session_tokens": 64}) as server:
        split = AutoSplitModelForCausalLM.from_pretrained(folder, trunk=server.address)
        assert held_out_loss(split, batches(3)) == held_out_loss(tiny_whole(folder), batches(3))
        assert not server.engine.open_sessions
        split.close()


def test_a_batch_without_learned_tokens_counts_for_nothing(whole: Any) -> None:
    nothing = collate([{"input_ids": [5, 6, 7], "labels": [IGNORED] * 3}])
    expected = held_out_loss(whole, batches(2))
    assert held_out_loss(whole, [*batches(2), nothing]) == expected
    with pytest.raises(DataError, match="no token"):
        held_out_loss(whole, [nothing])


def test_the_model_is_left_as_it_was(whole: Any) -> None:
    whole.train()
    held_out_loss(whole, batches(7))
    assert whole.training
    whole.eval()
