"""A cohort's rounds by each aggregation: closed with enough members only, and made again by their ledger."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from splitlearn.engine.aggregations import AGGREGATIONS
from splitlearn.engine.cohort import Cohort
from splitlearn.engine.contribution import Gradients
from splitlearn.engine.ledger import read, rounds
from splitlearn.engine.run import Run
from splitlearn.engine.step import Step
from splitlearn.engine.trunk_state import AdapterVersion
from splitlearn.errors import RoundUnfinished
from splitlearn.monitor.events import Event, Held, RoundClosed, event_of, figures
from splitlearn.testing.replay import replay
from splitlearn.vocabulary import CohortSettings, OptimizerSettings, RunSettings
from splitlearn.wire.messages import AnswerMessage, OptimizerStep, RunStepMessage

SCALE, RATE = 0.25, 1e-2
NAMES = "abcdef"
CARRY = CohortSettings("quorum", members=6, quorum=5, carry_late=True, clip_norm=0.5)
FIGURES = {"mean": {}, "norm_clip": {"member_norm": 0.7}}


def by(aggregation: str, settings: CohortSettings = CARRY) -> CohortSettings:
    return replace(settings, aggregation=aggregation, **FIGURES.get(aggregation, {"byzantine": 1}))


def gradients_of(member: str, step: int, version: AdapterVersion) -> Gradients:
    """They depend on the weights that they were computed with, as real ones do."""
    draw = torch.Generator().manual_seed(100 * ord(member) + step)
    return [
        weight.detach() * torch.randn(weight.shape, generator=draw) for weight in version.weights.values()
    ]


def a_run(settings: CohortSettings, optimizer: str = "adamw_torch") -> Run:
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(4, 3, generator=draw) for name in ("lower", "upper")}
    return Run(
        "notes", RunSettings(optimizer=OptimizerSettings(optimizer), cohort=settings), None, weights, b""
    )


class Desk:
    """A cohort whose members compute nothing: their gradients are `gradients_of`."""

    def __init__(self, settings: CohortSettings, names: Sequence[str] = NAMES, **how: str) -> None:
        self.run = a_run(settings, **how)
        # Whoever changes it keeps nothing on a disk, so that the ledger's lines stay.
        self.cohort = self.run.cohort = Cohort(self.run, 100.0, changed=lambda: None)
        for name in names:
            self.cohort.join(name.encode(), name)

    def begin(self, name: str) -> None:
        member = self.cohort.members[name]
        member.contribution.add(gradients_of(name, member.next_step, member.pin()))

    def give(self, name: str, weight: float = 1.0, scale: float = SCALE) -> AnswerMessage | None:
        member = self.cohort.members[name]
        asked = OptimizerStep(scale, RATE, False, weight)
        return self.cohort.take(member, RunStepMessage(member.step_key(member.next_step), optimizer=asked))

    def round(self, names: Sequence[str], **how: float) -> None:
        for name in names:
            self.begin(name)
        for name in names:
            self.give(name, **how)

    def events(self) -> list[Event]:
        return list(read(self.cohort.ledger.tail()))

    def weights(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.run.masters.values()]


def disturbed(settings: CohortSettings, **how: str) -> Desk:
    """Four rounds of five members each, who weigh differently; f comes late, and d is enormous in the end."""
    desk = Desk(settings, **how)
    for enormous in (SCALE, 1e6):
        desk.begin("f")
        desk.round("abcde")
        for name in "abcd":
            desk.begin(name)
        for number, name in enumerate("abcdf"):
            desk.give(name, weight=1.0 + number, scale=enormous if name == "d" else SCALE)
    return desk


def again(settings: CohortSettings, events: Sequence[Event], **how: str) -> list[Tensor]:
    run = a_run(settings, **how)
    replay(events, run, gradients_of)
    return [weight.detach() for weight in run.masters.values()]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "fedyogi"])
@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_ledger_alone_makes_the_same_weights_bit_for_bit(name, optimizer):
    settings = by(name)
    desk = disturbed(settings, optimizer=optimizer)
    events = desk.events()
    assert [part.staleness for closed in rounds(events) for part in closed.parts] == 2 * [*[0] * 9, 1]
    assert all(map(torch.equal, again(settings, events, optimizer=optimizer), desk.weights()))
    other = by("mean" if name != "mean" else "median")
    told = [without_let_through(each) for each in events]
    assert not all(map(torch.equal, again(other, told, optimizer=optimizer), desk.weights()))


def without_let_through(event: Event) -> Event:
    if not isinstance(event, RoundClosed):
        return event
    return replace(event, parts=tuple(replace(part, let_through=1.0) for part in event.parts))


@pytest.mark.parametrize("name", ["norm_clip", "krum"])
def test_a_ledger_that_says_what_was_let_through_is_checked_and_a_changed_one_is_found_out(name):
    desk = disturbed(by(name))
    last = list(rounds(desk.events()))[-1]
    through = {part.member: part.let_through for part in last.parts}
    assert through["d"] < 1e-3, "the enormous one"
    assert sum(through.values()) == 1.0 if name == "krum" else max(through.values()) <= 1.0
    with pytest.raises(ValueError, match="let other gradients through"):
        again(by(name), [without_let_through(each) for each in desk.events()])


def test_old_gradients_vote_and_make_the_whole_step_smaller():
    """They count fully where they are compared: made smaller before, an old one would often be the median."""
    settings = replace(by("median"), clip_norm=0.0, staleness_exponent=1.0)
    desk = Desk(settings, optimizer="sgd")
    first = desk.run.current
    desk.begin("f")
    desk.round("abcde")
    then, before = desk.run.current, desk.weights()
    for name in "abcd":
        desk.begin(name)
    for name in "abcdf":
        desk.give(name)
    votes = [gradients_of(name, 2, then) for name in "abcd"] + [gradients_of("f", 1, first)]
    for place, (old, new) in enumerate(zip(before, desk.weights(), strict=True)):
        median = torch.stack([SCALE * each[place] for each in votes]).median(dim=0).values
        moved = (old - new) / RATE
        assert torch.allclose(moved, 0.9 * median, rtol=1e-3, atol=1e-4), "four count 1, one counts 1/2"
        assert not torch.allclose(moved, median, rtol=1e-3, atol=1e-4)


def test_a_round_waits_where_too_few_are_left_for_its_aggregation_and_says_so_once():
    settings = replace(by("krum"), rule="sync", members=5, quorum=0, carry_late=False)
    desk = Desk(settings, "abcde")
    desk.round("abcde")
    assert desk.run.step == 1
    desk.cohort.leave(desk.cohort.members["e"])
    desk.round("abcd")
    assert desk.run.step == 1, "four members do not tell which of them is false"
    member = desk.cohort.members["a"]
    step = Step(b"", RunStepMessage(member.step_key(member.next_step), deadline_s=5.0))
    waiting = step.wait()
    desk.cohort.park(member, step)
    desk.cohort.tick(desk.cohort._parking.due_at)
    desk.give("a")
    assert isinstance(waiting.result(0).error, RoundUnfinished)
    assert "until 5 members have given, which krum needs" in waiting.result(0).error.message
    held = [each for each in desk.events() if isinstance(each, Held)]
    assert held == [Held(round=2, members=4, least=5)]
    assert event_of(figures(held[0])) == held[0]
    desk.cohort.join(b"f", "f")
    desk.round("f")
    assert desk.run.step == 2
    assert len(list(rounds(desk.events()))[-1].parts) == 5


def test_the_mean_goes_on_with_whoever_is_left():
    desk = Desk(CohortSettings("sync", members=5), "abcde")
    desk.round("abcde")
    for name in "bcde":
        desk.cohort.leave(desk.cohort.members[name])
    desk.round("a")
    assert desk.run.step == 2
    assert not [each for each in desk.events() if isinstance(each, Held)]


def test_a_held_quorum_does_not_ask_to_be_looked_at_all_the_time():
    """Its time is up only where enough have given, and enough are as many as the aggregation needs."""
    desk = Desk(replace(by("median"), members=5, quorum=3, timeout_s=10.0), "abcde")
    for name in "cde":
        desk.cohort.leave(desk.cohort.members[name])
    desk.round("ab")
    desk.cohort._open_since -= 60
    assert desk.run.step == 0
    assert desk.cohort.due_at > desk.cohort._open_since + 70


def test_a_ledger_line_from_before_aggregations_is_read():
    line = figures(next(rounds(disturbed(by("mean")).events())))
    for part in line["parts"]:
        del part["let_through"]
    old = event_of(line)
    assert isinstance(old, RoundClosed)
    assert all(part.let_through == 1.0 for part in old.parts)
