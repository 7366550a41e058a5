"""Nobody starves: kinds of work share the turns, clients go in rounds, deadlines decide among equals."""

import random
from collections import Counter
from collections.abc import Iterable
from itertools import count, pairwise
from types import SimpleNamespace

import pytest
import torch

from splitlearn.config import BatchingConfig
from splitlearn.engine.ready_step import ReadyRunStep, ReadyStep, Work
from splitlearn.engine.scheduler import Scheduler, Share
from splitlearn.engine.session import Session
from splitlearn.engine.step import Step
from splitlearn.errors import SettingError
from splitlearn.vocabulary import Phase, Precision, StepKey
from splitlearn.wire.messages import RunStepMessage, StepMessage

CHUNK = 64
AGES = count()


def decode(
    client: str = "me", tokens: int = 1, *, deadline_s: float = 0.0, adapter: object = None
) -> ReadyStep:
    message = StepMessage(StepKey(session=1, step=1), torch.zeros(1, tokens, 1), deadline_s=deadline_s)
    session = Session((client.encode(), 1), 0, Precision(), (0,), 0.0, adapter=adapter)
    return ReadyStep(Step(client.encode(), message, float(next(AGES))), session, CHUNK)


def prompt(client: str = "me", tokens: int = 10 * CHUNK, **how) -> ReadyStep:
    return decode(client, tokens, **how)


def training(client: str = "me") -> ReadyRunStep:
    message = RunStepMessage(StepKey(run=1, step=1, phase=Phase.BACKWARD), deadline_s=1.0)
    return ReadyRunStep(Step(client.encode(), message, float(next(AGES))), SimpleNamespace())


def scheduler(*waiting, batched: bool = True, **config) -> Scheduler:
    made = Scheduler(BatchingConfig(prefill_chunk_tokens=CHUNK, **config), batched=batched)
    for each in waiting:
        made.add(each)
    return made


def kinds(turns: int, always: Iterable, **config) -> list[Work]:
    """Whose turns they are, when what ran is followed by another of its kind at once."""
    made = scheduler(*[make() for make in always], **config)
    again = {make().work: make for make in always}
    taken = []
    for _ in range(turns):
        (ran,) = made.next_batch()
        taken.append(ran.work)
        made.add(again[ran.work]())
    return taken


def leaders(made: Scheduler, turns: int) -> list[str]:
    return [made.next_batch()[0].step.client.decode() for _ in range(turns)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (50, 25, 25)),
        ({"decode_share": 0.8}, (80, 10, 10)),
        ({"decode_share": 0.1, "training_share": 0.9}, (10, 9, 81)),
        ({"training_share": 0.01}, (50, 49, 1)),
    ],
)
def test_kinds_that_wait_all_the_time_have_their_shares_of_the_turns(config, expected):
    had = Counter(kinds(1000, [decode, prompt, training], **config))
    for work, percent in zip((Work.DECODE, Work.PREFILL, Work.TRAINING), expected, strict=True):
        assert had[work] == pytest.approx(10 * percent, abs=10)


def test_who_waits_alone_has_every_turn():
    for make in (decode, prompt, training):
        assert kinds(9, [make]) == [make().work] * 9


def test_a_share_of_all_or_of_nothing_is_refused():
    for share in (0, 1, -0.5, 2):
        with pytest.raises(SettingError, match="training_share"):
            BatchingConfig(training_share=share)


def test_a_decode_step_waits_for_one_other_turn_at_most():
    """Whatever comes in between, and whenever."""
    dice = random.Random(0)
    for _ in range(50):
        made = scheduler(prompt(), training())
        others_in_a_row = 0
        for _ in range(200):
            if dice.random() < 0.3:
                made.add(decode())
            decode_waits = any(each.work is Work.DECODE for each in made)
            ran = made.next_batch()[0]
            others_in_a_row = 0 if ran.work is Work.DECODE or not decode_waits else others_in_a_row + 1
            assert others_in_a_row <= 1
            if ran.work is not Work.DECODE:
                made.add(prompt() if ran.work is Work.PREFILL else training())


def test_turns_that_nobody_contested_are_not_paid_back_in_a_row():
    share = Share(0.5)
    for _ in range(100):
        assert not share.is_next(waits=False, other_waits=True)
    contested = [share.is_next(waits=True, other_waits=True) for _ in range(6)]
    assert contested == [True, False, True, False, True, False]


def test_a_client_with_many_steps_does_not_keep_anothers_one_waiting():
    crowd = [decode("crowd", adapter=object()) for _ in range(50)]
    made = scheduler(*crowd, decode("lone", adapter=object()))
    assert "lone" in leaders(made, 2)


def test_many_prompts_of_one_client_do_not_keep_anothers_waiting():
    made = scheduler(*[prompt("crowd", rows) for rows in range(100, 150)], prompt("lone"), batched=False)
    assert "lone" in leaders(made, 2)


def test_training_steps_of_two_clients_alternate():
    made = scheduler(*[training("first") for _ in range(3)], *[training("second") for _ in range(3)])
    assert leaders(made, 6) == ["first", "second"] * 3


def test_clients_that_come_anew_all_the_time_do_not_keep_an_old_one_waiting():
    made = scheduler(decode("old", adapter=object()), decode("old", adapter=object()))
    led = []
    for newcomer in range(20):
        made.add(decode(f"new {newcomer}", adapter=object(), deadline_s=1e-9))
        led += leaders(made, 1)
    first, second = (turn for turn, client in enumerate(led) if client == "old")
    assert second - first <= 3, "who joined its round before it, and no others"


def test_where_not_all_fit_each_client_has_a_seat_before_another_has_two():
    made = scheduler(*[decode("crowd") for _ in range(50)], decode("lone"), decode("other"), max_batch_rows=4)
    seated = [each.step.client.decode() for each in made.next_batch()]
    assert sorted(seated) == ["crowd", "crowd", "lone", "other"]


def test_steps_of_other_token_counts_or_adapters_run_apart_and_in_turn():
    """A crowd that decodes one token a step, one that tries four, one with an adapter of its own."""
    tuned = object()
    again = {
        "one": lambda: decode("one"),
        "also one": lambda: decode("also one"),
        "four": lambda: decode("four", 4),
        "tuned": lambda: decode("tuned", adapter=tuned),
    }
    made = scheduler(*[make() for make in again.values()])
    had: Counter[str] = Counter()
    for _ in range(90):
        batch = made.next_batch()
        assert len({(each.tokens, id(each.session.adapter)) for each in batch}) == 1
        for each in batch:
            client = each.step.client.decode()
            had[client] += 1
            made.add(again[client]())
    assert had["one"] == had["also one"], "they run together"
    assert min(had.values()) >= 20


def test_the_earlier_deadline_goes_first_among_equals_then_the_older_step():
    steps = [
        decode("none"),
        decode("late", deadline_s=90.0),
        decode("soon", deadline_s=10.0),
        decode("later", deadline_s=90.0),
    ]
    for each in steps:
        each.session.adapter = object()
    assert leaders(scheduler(*steps), 4) == ["soon", "late", "later", "none"]


def test_a_runs_steps_keep_their_order():
    steps = [training() for _ in range(5)]
    made = scheduler(*steps)
    assert [made.next_batch()[0] for _ in steps] == steps


def test_the_same_arrivals_give_the_same_turns():
    def turns(seed: int) -> list[str]:
        dice = random.Random(seed)
        made = scheduler(*[dice.choice((decode, prompt, training))(f"{n % 7}") for n in range(60)])
        names = []
        while made:
            names += [f"{each.work}{each.step.client!r}" for each in made.next_batch()]
        return names

    assert turns(3) == turns(3)
    assert turns(3) != turns(4)


def test_there_is_room_for_company_only_while_nothing_else_could_run():
    assert scheduler(decode(), decode(), max_batch_rows=5).room_for_company == 3
    for other in (prompt(), training()):
        assert not scheduler(decode(), other).room_for_company


def test_a_full_batch_and_steps_that_run_one_by_one_have_no_room_for_company():
    assert not scheduler(decode(), decode(), max_batch_rows=2).room_for_company
    assert not scheduler(decode(), batched=False).room_for_company


def test_what_is_taken_out_is_not_run():
    steps = [decode("me"), decode("you"), prompt("me"), training("you")]
    made = scheduler(*steps)
    gone = made.take_out_where(lambda each: each.step.client == b"me")
    assert gone == [steps[0], steps[2]]
    assert len(made) == 2
    assert {each for _ in range(2) for each in made.next_batch()} == {steps[1], steps[3]}
    assert not made
    made.add(steps[0])
    assert made.next_batch() == [steps[0]]


def test_pieces_of_a_short_prompt_come_between_those_of_anothers_long_one():
    long, short = prompt("long", 9 * CHUNK), prompt("short", 2 * CHUNK)
    made = scheduler(long, short, batched=False)
    ran = []
    while made:
        (member,) = made.next_batch()
        ran.append(member)
        member.done += member.tokens
        if not member.is_done:
            made.add(member)
    assert ran[:4].count(short) == 2
    assert all(one.done <= 9 * CHUNK for one, _ in pairwise(ran))
