import pytest
import torch

from splitlearn.cli.checks import Outcome
from splitlearn.cli.parity import EXACT_ON_CPU, Pair, left_padded, parity_checks, tolerance_of
from splitlearn.testing.tiny import tiny_model, tiny_whole

INPUTS = {
    "input_ids": torch.tensor([[5, 9, 20, 31, 7, 8]]),
    "attention_mask": torch.ones(1, 6, dtype=torch.long),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("parity")
    return [tiny_whole(tiny_model("llama", root / str(seed), seed)) for seed in (0, 1)]


def outcomes(split, whole):
    checks = list(parity_checks(Pair(split, whole, EXACT_ON_CPU), INPUTS))
    return {check.name: check.outcome for check in checks}


def test_a_model_equals_itself(models):
    assert set(outcomes(models[0], models[0]).values()) == {Outcome.OK}


def test_another_model_is_found_out(models):
    found = outcomes(models[0], models[1])
    assert found["logits"] is found["logits, no cache"] is found["padded batch"] is Outcome.FAILED


def test_a_call_that_fails_is_a_failed_check(models):
    from splitlearn.errors import SessionLost

    def lost(**asked):
        raise SessionLost("the session is gone")

    lost.generate = lost
    found = list(parity_checks(Pair(lost, models[0], EXACT_ON_CPU), INPUTS))
    assert {check.outcome for check in found} == {Outcome.FAILED}
    assert found[0].found == "the session is gone"


def test_the_padded_batch_is_the_prompt_and_its_first_half():
    batch = left_padded(INPUTS["input_ids"])
    assert batch["input_ids"].tolist() == [[5, 9, 20, 31, 7, 8], [0, 0, 0, 5, 9, 20]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [0, 0, 0, 1, 1, 1]]


def test_only_one_precision_on_one_kind_of_device_is_held_to_be_exact():
    assert tolerance_of({"float32", "auto"}, "cpu") == EXACT_ON_CPU
    assert tolerance_of({"float32"}, "cuda:0") > EXACT_ON_CPU
    assert tolerance_of({"float32", "bfloat16"}, "cpu") > tolerance_of({"float32"}, "cuda:0")
