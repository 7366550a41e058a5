import pytest
from typer.testing import CliRunner

from splitlearn.cli.cost import (
    Work,
    split_cost,
    tokens_with_cache,
    tokens_without_cache,
    weightless_trunk,
    wire_cost,
)
from splitlearn.cli.main import app
from splitlearn.engine.runner import measure_layers
from splitlearn.errors import CheckpointError
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.plan import SplitPlan
from splitlearn.model.slices import write_slice
from splitlearn.model.weights import load_trunk
from splitlearn.testing.tiny import tiny_model


def test_tokens_that_cross_with_and_without_a_cache():
    assert tokens_with_cache(16, 100) == 115
    assert tokens_without_cache(16, 100) == sum(range(16, 116))
    assert tokens_with_cache(7, 1) == tokens_without_cache(7, 1) == 7


def test_the_wire_costs_of_smollm2_are_those_of_the_design():
    wire = wire_cost(576 * 4, Work(batch=1, seq=16, new_tokens=100))
    assert wire.bytes_per_token == 4608
    assert wire.generation_bytes == pytest.approx(0.53e6, rel=0.01)
    assert wire.generation_bytes_without_cache == pytest.approx(30.2e6, rel=0.01)
    assert wire.training_step_bytes == 4 * 1 * 16 * 576 * 4


def test_rows_cost_alike():
    one, four = (wire_cost(100, Work(batch, 10, 5)) for batch in (1, 4))
    assert four.bytes_per_token == one.bytes_per_token
    assert four.decode_step_bytes == 4 * one.decode_step_bytes
    assert four.generation_bytes == 4 * one.generation_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("cost") / "llama")


def test_another_dtype_changes_what_is_held_and_what_is_sent(folder):
    checkpoint, plan, work = Checkpoint.open(folder), SplitPlan(6, 2, 2), Work(1, 8, 4)
    stored = split_cost(checkpoint, plan, work, 128)
    half = split_cost(checkpoint, plan, work, 128, dtype="bfloat16")
    assert half.trunk.weight_bytes * 2 == stored.trunk.weight_bytes
    assert half.kv.bytes_per_token * 2 == stored.kv.bytes_per_token
    assert half.wire.bytes_per_token * 2 == stored.wire.bytes_per_token
    narrow = split_cost(checkpoint, plan, work, 128, codec="half")
    assert narrow.trunk == stored.trunk
    assert narrow.wire == half.wire


def test_a_session_is_no_longer_than_the_models_positions(folder):
    cost = split_cost(Checkpoint.open(folder), SplitPlan(6, 2, 2), Work(3, 8, 4), 4096)
    assert cost.kv.session_tokens == 256
    assert cost.kv.bytes_per_session == 3 * 256 * cost.kv.bytes_per_token


def test_a_slice_cannot_tell_of_the_other_side(folder, tmp_path):
    plan = SplitPlan(6, 2, 2)
    part = write_slice(Checkpoint.open(folder), plan, "client", tmp_path / "client")
    with pytest.raises(CheckpointError, match="plan the whole model"):
        split_cost(Checkpoint.open(part), plan, Work(1, 8, 4), 128)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "deepseek_v3", "bloom"])
def test_a_trunk_without_weights_tells_what_the_real_one_keeps_of_a_token(family, tmp_path):
    checkpoint, plan = Checkpoint.open(tiny_model(family, tmp_path / family)), SplitPlan(6, 2, 2)
    assert measure_layers(weightless_trunk(checkpoint, plan)) == measure_layers(load_trunk(checkpoint, plan))


def test_plan_prints_a_table(folder):
    shown = CliRunner().invoke(app, ["plan", str(folder), "--batch", "2"])
    assert shown.exit_code == 0, shown.output
    assert "split 2/2/2" in shown.output
    assert "the same text without the cache" in shown.output
