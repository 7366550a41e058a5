import pytest
import torch

from splitlearn.cli.gradient_parity import LORA, SEED, check_gradients
from splitlearn.client.training import prepare_training
from splitlearn.testing import lively_model, split_over_loopback, tiny_whole

IDS = torch.tensor([[5, 9, 20, 31, 7, 8]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.mark.parametrize(("seed", "is_equal"), [(0, True), (1, False)])
def test_the_same_models_gradients_are_equal_and_anothers_are_not(tmp_path, seed, is_equal):
    folder = lively_model("llama", tmp_path / "0")
    whole = tiny_whole(lively_model("llama", tmp_path / str(seed), seed))
    with split_over_loopback(folder) as split:
        prepare_training(split, LORA, None, (), SEED)
        passed, found = check_gradients(split, whole, INPUTS, tolerance=1e-5)
    assert passed is is_equal
    assert ("bit for bit equal" in found) is is_equal
