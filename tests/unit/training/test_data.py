import math
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import TrainingArguments

from splitlearn.client.training import prepare_training
from splitlearn.errors import DataError, SettingError
from splitlearn.testing.loopback import split_over_loopback
from splitlearn.testing.tiny import tiny_config, tiny_model
from splitlearn.training.data import training_data
from splitlearn.training.held_out import held_out
from splitlearn.training.lines import Completion, read_examples
from splitlearn.training.tokens import IGNORED
from splitlearn.training.trainer import SplitTrainer
from splitlearn.vocabulary import Phase
from splitlearn.wire.messages import RunStepMessage

LINES = [{"prompt": f"Rule {n}? ", "completion": "Wash hands. " * (1 + n % 4)} for n in range(12)]


@given(st.integers(2, 200), st.floats(0, 1, exclude_max=True), st.integers(0, 1 << 40))
def test_every_example_is_learned_or_held_out(count, share, seed):
    examples = list(range(count))
    train, kept_back = held_out(examples, share, seed)
    assert sorted(train + kept_back) == examples
    assert train == sorted(train)
    assert kept_back == sorted(kept_back)
    assert (train, kept_back) == held_out(examples, share, seed)
    if share:
        assert train
        assert kept_back
        assert len(kept_back) in (1, count - 1) or abs(len(kept_back) - share * count) <= 0.5
    else:
        assert train == examples


def test_another_seed_holds_others_out():
    assert held_out(range(100), 0.2, seed=0)[1] != held_out(range(100), 0.2, seed=1)[1]


def test_what_is_held_out_does_not_change_between_versions():
    """A run that is resumed must not learn what it measured on."""
    assert held_out(range(10), 0.3, seed=0)[1] == [3, 5, 7]


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, math.nan, math.inf])
def test_a_share_out_of_its_range_is_refused(share):
    with pytest.raises(DataError, match="from 0 up to, not including, 1"):
        held_out(range(10), share, seed=0)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_examples_cannot_be_parted(count):
    assert held_out(range(count), 0, seed=0) == (list(range(count)), [])
    with pytest.raises(DataError, match="add examples"):
        held_out(range(count), 0.5, seed=0)


@pytest.mark.parametrize("pack_for", [None, tiny_config("llama")], ids=["unpacked", "packed"])
def test_every_token_that_is_learned_is_there_once(write, tokenizer_of, pack_for):
    tokenizer = tokenizer_of()
    data = training_data(
        write(*LINES), tokenizer, max_tokens=80, held_out_share=0.25, seed=3, pack_for=pack_for
    )
    completions = sum(len(line["completion"]) + len(["</s>"]) for line in LINES)
    rows = [*data.train, *data.held_out]
    assert (data.train_examples, data.held_out_examples) == (9, 3)
    assert (data.truncated, data.dropped) == (0, 0)
    assert sum(label != IGNORED for row in rows for label in row["labels"]) == completions
    assert (len(rows) < len(LINES)) == (pack_for is not None)


def test_the_same_examples_are_held_out_packed_and_unpacked(write, tokenizer_of):
    how = {"tokenizer": tokenizer_of(), "max_tokens": 80, "held_out_share": 0.25}
    alone = training_data(write(*LINES), **how)
    together = training_data(write(*LINES), **how, pack_for=tiny_config("llama"))
    tokens = [sorted(t for row in data.held_out for t in row["input_ids"] if t) for data in (alone, together)]
    assert tokens[0] == tokens[1]


def test_a_bad_line_is_named(write, tokenizer_of):
    file = write(*LINES, {"prompt": "Rule 13?"})
    with pytest.raises(DataError, match=f"^{file}:13: "):
        training_data(file, tokenizer_of(), max_tokens=80)


def test_nothing_left_to_learn_is_an_error(write, tokenizer_of):
    with pytest.raises(DataError, match=r"nothing of the 12 examples .* raise max_tokens"):
        training_data(write(*LINES), tokenizer_of(), max_tokens=4)


def test_a_family_that_cannot_be_packed_is_refused_before_anything_is_read(tokenizer_of):
    with pytest.raises(SettingError, match="opt cannot learn from packed examples"):
        training_data("absent.jsonl", tokenizer_of(), max_tokens=80, pack_for=tiny_config("opt"))


def steps_of(split, monkeypatch) -> list[RunStepMessage]:
    """The forwards that the trunk will be sent."""
    sent, tell = [], split.trunk.transport.run_step

    def overhear(message):
        if message.key.phase in (Phase.FORWARD, Phase.EVALUATE):
            sent.append(message)
        return tell(message)

    monkeypatch.setattr(split.trunk.transport, "run_step", overhear)
    return sent


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_librarys_trainer_takes_it(tmp_path, monkeypatch, write, tokenizer_of, is_packed):
    folder = tiny_model("llama", tmp_path / "model")
    with split_over_loopback(folder) as split:
        prepare_training(split, LoraConfig(r=4, target_modules="all-linear"), None, (), 0)
        data = training_data(
            write(*LINES),
            tokenizer_of(),
            max_tokens=80,
            held_out_share=0.25,
            pack_for=split.config if is_packed else None,
        )
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            num_train_epochs=4,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = SplitTrainer(
            model=split,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            data_collator=data.collate,
        )
        sent = steps_of(split, monkeypatch)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert all((step.positions_BT is not None) == is_packed for step in sent)
        assert any(step.mask_columns_BT is not None for step in sent) != is_packed
        assert trainer.evaluate()["eval_loss"] < before - 0.1


def test_the_bundled_text_can_be_learned_from():
    examples = read_examples(str(files("splitlearn.cli") / "demo_text.jsonl"))
    assert {type(example) for example in examples} == {Completion}
    assert len({example.prompt for example in examples}) == len(examples) >= 24
