"""An average is made once all have given that are there, once, and is on the disk before it is told."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splitlearn.engine.disk_budget import DiskBudget
from splitlearn.engine.ends import Awaited, Ends, EndsBudget
from splitlearn.errors import (
    AdapterError,
    CheckpointError,
    ContributionLost,
    ResourceExhausted,
    RunLost,
    StepOutOfOrder,
)
from splitlearn.vocabulary import LoraSettings, RunSettings, ShareSettings
from splitlearn.wire.messages import GivenEnds

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
EVERY, MIB = 4, 1 << 20


def ends(rule: str = "fedex", budget: EndsBudget | None = None) -> Ends:
    settings = RunSettings(lora=LoraSettings(r=2), share=ShareSettings(rule, every=EVERY))
    return Ends("notes", settings, budget or EndsBudget(MIB))


def given(seed: int, number: int = 1, weight: float = 1.0) -> GivenEnds:
    draw = torch.Generator().manual_seed(seed)
    weights = {A: torch.randn(2, 6, generator=draw), B: torch.randn(5, 2, generator=draw)}
    return GivenEnds(number, weight, 0, weights)


def awaited(*names: str, version: int = 4, is_complete: bool = True) -> Awaited:
    return Awaited(frozenset(names), is_complete, version)


def average_of(here: Ends, *members: str, number: int = 1) -> None:
    for seed, name in enumerate(members):
        here.give(name, given(10 * number + seed, number, seed + 1.0))
    assert here.close_if(awaited(*members, version=EVERY * number))


def test_it_waits_for_those_that_are_there_and_for_nobody_else():
    here = ends()
    here.give("a", given(1))
    assert not here.close_if(awaited("a", "b"))
    assert "waits for b" in here.missing(awaited("a", "b"))
    assert not here.close_if(awaited("a", is_complete=False))
    assert here.find("a", 1) is None
    here.give("gone", given(2))
    assert here.close_if(awaited("a"))
    average = here.find("a", 1)
    assert average is not None
    # Whoever has left since has given all the same.
    assert (average.number, average.members, average.due) == (1, 2, 4 + EVERY)
    assert not here.close_if(awaited("a")), "of nothing there is no average"


def test_the_last_of_what_a_member_gives_counts_once():
    twice, once = ends("fedavg"), ends("fedavg")
    twice.give("a", given(1))
    for here in (twice, once):
        here.give("a", given(2, weight=3.0))
        here.give("b", given(3))
        here.close_if(awaited("a", "b"))
    found, wanted = (here.find("a", 1) for here in (twice, once))
    assert found is not None
    assert wanted is not None
    assert found.members == 2
    assert all(torch.equal(each, wanted.weights[name]) for name, each in found.weights.items())


def test_who_gives_to_an_average_that_is_made_is_told_the_newest():
    here = ends()
    average_of(here, "a", "b", number=1)
    average_of(here, "a", "b", number=2)
    here.give("late", given(9, number=1))
    newest = here.find("late", 1)
    assert newest is not None
    assert newest.number == 2
    assert not here.close_if(awaited("late"))
    with pytest.raises(StepOutOfOrder, match="the next is 3"):
        here.give("a", given(1, number=4))


def test_who_has_the_one_before_is_told_what_is_new_and_others_are_told_all():
    here = ends()
    average_of(here, "a", "b", number=1)
    first = here.find("a", 1)
    average_of(here, "a", "b", number=2)
    second = here.find("a", 2)
    assert first is not None
    assert second is not None
    new, everything = second.since(1), second.since(0)
    assert (new.since_start, everything.since_start) == (False, True)
    dense = [up @ down for up, down in (new.residual["layer"], everything.residual["layer"])]
    torch.testing.assert_close(dense[0] + first.residual["layer"].dense(), dense[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dense[0], dense[1], atol=1e-3)


def test_an_average_outlives_the_server_and_what_was_only_given_does_not(tmp_path):
    folder, here = tmp_path / "notes", ends()
    here.wake(folder, DiskBudget(tmp_path, MIB))
    average_of(here, "a", "b")
    here.give("a", given(1, number=2))
    told = here.find("a", 1)
    again = ends()
    again.wake(folder)
    kept = again.find("a", 1)
    assert told is not None
    assert kept is not None
    assert (kept.number, kept.due, kept.members, kept.aggregation_residual) == (
        1,
        2 * EVERY,
        2,
        told.aggregation_residual,
    )
    assert all(torch.equal(each, kept.weights[name]) for name, each in told.weights.items())
    assert torch.equal(kept.residuals["layer"].dense(), told.residuals["layer"].dense())
    with pytest.raises(ContributionLost, match="give them again"):
        again.find("a", 2)
    average_of(again, "a", "b", number=2)
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="torn"):
        ends().wake(folder)


def test_what_cannot_be_kept_is_not_told_and_is_tried_again(tmp_path: Path):
    here = ends()
    here.wake(tmp_path / "notes", DiskBudget(tmp_path, 100))
    here.give("a", given(1))
    for _ in range(2):
        with pytest.raises(ResourceExhausted, match="average 1"):
            here.close_if(awaited("a"))
    assert here.find("a", 1) is None


def test_memory_is_counted_and_given_back():
    size = given(1).nbytes
    budget = EndsBudget(4 * size)
    here = ends("fedavg", budget)
    for number in (1, 2, 3, 4, 5):
        average_of(here, "a", "b", number=number)
    here.give("a", given(1, number=6))
    here.give("a", given(2, number=6))
    here.give("b", given(2, number=6))
    here.give("c", given(2, number=6))
    with pytest.raises(ResourceExhausted, match="max_ends_bytes"):
        here.give("d", given(2, number=6))
    here.end()
    with pytest.raises(RunLost, match="closed"):
        here.give("a", given(1))
    budget.take(4 * size)
    with pytest.raises(ResourceExhausted):
        budget.take(1)


def test_an_adapter_of_b_alone_is_for_ffa_and_its_a_is_everybodys():
    here = ends("ffa")
    with pytest.raises(AdapterError, match="do not make one adapter"):
        here.give("a", given(1))
    alone = replace(given(1), weights={B: given(1).weights[B]}, frozen=7)
    here.give("a", alone)
    with pytest.raises(AdapterError, match="frozen A"):
        here.give("b", replace(alone, frozen=8))
    with pytest.raises(AdapterError, match="do not make one adapter"):
        ends("fedavg").give("a", alone)
