"""What a run takes of its members' bottoms and tops is checked, counted and bounded before it is trained."""

import pytest
import torch

from splitlearn.engine import optimizer, shared_ends
from splitlearn.engine.run import Run
from splitlearn.errors import MessageError, ResourceExhausted, SettingError
from splitlearn.vocabulary import CohortSettings, OptimizerSettings, RunSettings, ShareSettings
from splitlearn.wire.share import require_sensible

SHARED = RunSettings(
    optimizer=OptimizerSettings(), cohort=CohortSettings("sync", members=2), share=ShareSettings("sync")
)


def run_of(settings: RunSettings = SHARED) -> Run:
    return Run("notes", settings, None, {"trunk.lora_A": torch.ones(2, 3)}, b"")


def ends() -> dict[str, torch.Tensor]:
    return {"top.lora_A": torch.full((2, 3), 2.0), "bottom.lora_A": torch.full((4,), 3.0)}


def test_first_values_are_in_the_order_of_their_names_whoever_brings_them():
    assert list(shared_ends.first(ends(), (), 1 << 20)) == ["bottom.lora_A", "top.lora_A"]


def test_first_values_that_are_too_large_no_numbers_or_the_trunks_are_refused():
    with pytest.raises(ResourceExhausted, match="smaller rank"):
        shared_ends.first(ends(), (), 39)
    with pytest.raises(MessageError, match="the trunk's"):
        shared_ends.first(ends(), ("top.lora_A",), 1 << 20)
    with pytest.raises(MessageError, match="no numbers"):
        shared_ends.first({"top.lora_A": torch.tensor([float("nan")])}, (), 1 << 20)


def test_gradients_come_in_the_runs_order_and_scaled_and_may_lack():
    held = shared_ends.first(ends(), (), 1 << 20)
    found = shared_ends.gradients({"top.lora_A": torch.ones(2, 3)}, held, 0.5)
    assert found[0] is None
    assert torch.equal(found[1], torch.full((2, 3), 0.5))


def test_gradients_of_other_weights_and_shapes_are_refused():
    with pytest.raises(MessageError, match="lack"):
        shared_ends.gradients({"x.lora_A": torch.ones(2)}, ends(), 1.0)
    with pytest.raises(MessageError, match="shape"):
        shared_ends.gradients({"top.lora_A": torch.ones(3, 2)}, ends(), 1.0)


def test_what_a_run_holds_counts_its_ends_with_gradients_and_optimizer():
    run = run_of()
    before = run.held_bytes
    run.take_ends(ends())
    added = 4 * (6 + 4)
    assert run.held_bytes - before == 2 * added + optimizer.state_bytes(SHARED.optimizer, added)
    assert run.account.bytes == run.held_bytes


def test_a_runs_snapshot_brings_its_ends_back_with_their_optimizers_state():
    run = run_of()
    run.take_ends(shared_ends.first(ends(), run.masters, 1 << 20))
    gradients = [torch.ones_like(master) for master in run.masters.values()]
    run.step_with(gradients, 0.1)
    again = run_of()
    again.restore(run.snapshot())
    for each in (run, again):
        each.step_with(gradients, 0.1)
    assert list(again.current.ends) == ["bottom.lora_A", "top.lora_A"]
    assert all(torch.equal(again.masters[name], weight) for name, weight in run.masters.items())
    assert not torch.equal(again.current.ends["top.lora_A"], ends()["top.lora_A"])


def test_only_cohorts_share():
    require_sensible(SHARED.share, SHARED.cohort)
    require_sensible(RunSettings().share, RunSettings().cohort)
    with pytest.raises(SettingError, match="cohort"):
        require_sensible(SHARED.share, CohortSettings())
