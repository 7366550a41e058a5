"""Sessions are opened, found, forked, fenced, closed and expired; each is its client's own."""

import pytest
import torch

from splitlearn.config import SessionConfig
from splitlearn.engine.kv_cache import KvCache, LayerShape
from splitlearn.engine.session_table import SessionTable
from splitlearn.errors import (
    AdapterError,
    KvBudgetExceeded,
    MessageError,
    ResourceExhausted,
    SessionExpired,
    SessionLost,
    SessionTooLong,
    StepOutOfOrder,
)
from splitlearn.vocabulary import StepKey, Versions
from splitlearn.wire.messages import AnswerMessage, CloseMessage, ForkMessage, OpenSession, StepMessage

ME, YOU = b"me", b"you"


class Table(SessionTable):
    """A table with its cache at hand, and a clock that the test turns."""

    def __init__(self, **config) -> None:
        self.kv = KvCache(
            [LayerShape(1, 1, 1)],
            budget_bytes=6 * 8 * 8,
            slot_tokens=8,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        super().__init__(self.kv, SessionConfig(**({"lease_s": 10.0, "answer_window": 2} | config)), 100)


def step(
    number: int, session: int = 1, *, rows: int = 1, tokens: int = 1, incarnation: int = 0, **fields
) -> StepMessage:
    key = StepKey(session=session, step=number, incarnation=incarnation)
    return StepMessage(key, torch.zeros(rows, tokens, 4), **fields)


def opening(session: int = 1, **fields) -> StepMessage:
    return step(1, session, open=OpenSession(), **fields)


def done(table: Table, session, message: StepMessage, now: float = 0.0) -> AnswerMessage:
    answer = AnswerMessage(message.key, torch.zeros(message.rows, message.tokens, 4))
    table.advance(session, message.tokens, answer, now)
    return answer


def test_a_session_opens_with_its_first_step_and_is_found_by_the_next():
    table = Table()
    session = table.enter(ME, opening(rows=2), now=0.0)
    done(table, session, opening(rows=2))
    assert table.enter(ME, step(2, rows=2), now=1.0) is session
    assert (session.rows, session.length, session.next_step) == (2, 1, 2)


def test_a_session_is_out_of_reach_for_another_client():
    table = Table()
    table.enter(ME, opening(), now=0.0)
    with pytest.raises(SessionLost):
        table.enter(YOU, step(2), now=0.0)
    table.close(YOU, CloseMessage(1))
    assert len(table) == 1
    with pytest.raises(SessionLost):
        table.fork(YOU, ForkMessage(1, 2), now=0.0)


def test_two_clients_may_use_the_same_number():
    table = Table()
    assert table.enter(ME, opening(), now=0.0) is not table.enter(YOU, opening(), now=0.0)


def test_a_repeated_opening_finds_the_session_that_it_opened():
    table = Table()
    session = table.enter(ME, opening(), now=0.0)
    kept = done(table, session, opening())
    assert table.enter(ME, opening(), now=0.0) is session
    assert table.kept_answer(session, 1) is kept


def test_a_step_that_was_done_is_answered_from_the_window():
    table = Table()
    session = table.enter(ME, opening(), now=0.0)
    kept = done(table, session, opening())
    assert table.kept_answer(session, 1) is kept
    assert table.kept_answer(session, 2) is None


@pytest.mark.parametrize("number", [0, 1, 4, 9])
def test_a_step_that_is_neither_next_nor_kept_is_out_of_order(number):
    table = Table()
    session = table.enter(ME, opening(), now=0.0)
    for each in (opening(), step(2)):
        done(table, session, each)
    table.enter(ME, step(3, acked_through=1), now=0.0)
    with pytest.raises(StepOutOfOrder) as refused:
        table.kept_answer(session, number)
    assert refused.value.facts["current_step"] == 3


def test_a_newer_incarnation_takes_over_and_the_older_one_is_turned_away():
    table = Table()
    table.enter(ME, opening(), now=0.0)
    newer = table.enter(ME, opening(incarnation=1), now=0.0)
    assert newer.incarnation == 1
    with pytest.raises(SessionLost):
        table.enter(ME, step(2), now=0.0)
    with pytest.raises(SessionLost):
        table.enter(ME, opening(), now=0.0)
    assert len(table) == 1


def test_a_fork_is_a_session_of_its_own_with_the_same_tokens():
    table = Table()
    session = table.enter(ME, opening(rows=2), now=0.0)
    done(table, session, opening(rows=2))
    table.kv.keys_SHLE[0][session.slots[1], :, 0] = 5
    table.fork(ME, ForkMessage(1, 2, at_step=1), now=0.0)
    child = table.find((ME, 2), 0)
    assert (child.length, child.rows, child.next_step) == (1, 2, 1)
    assert table.kv.keys_SHLE[0][child.holding[1], 0, 0, 0] == 5
    assert not set(child.slots) & set(session.slots)


def test_a_fork_of_another_state_or_into_a_name_that_is_taken_is_refused():
    table = Table()
    session = table.enter(ME, opening(), now=0.0)
    done(table, session, opening())
    with pytest.raises(StepOutOfOrder):
        table.fork(ME, ForkMessage(1, 2, at_step=0), now=0.0)
    table.enter(ME, opening(3), now=0.0)
    with pytest.raises(MessageError):
        table.fork(ME, ForkMessage(1, 3, at_step=1), now=0.0)


def test_a_session_that_is_idle_for_longer_than_its_lease_expires_and_says_so():
    table = Table()
    session = table.enter(ME, opening(), now=0.0)
    done(table, session, opening())
    assert table.expire(now=10.0) == 0
    assert table.expire(now=10.1) == 1
    assert table.kv.free_bytes == table.kv.total_bytes
    with pytest.raises(SessionExpired, match="10 s"):
        table.enter(ME, step(2), now=10.2)


def test_work_renews_the_lease_and_running_work_holds_it():
    table = Table()
    session = table.enter(ME, opening(), now=0.0)
    done(table, session, opening())
    table.enter(ME, step(2), now=9.0)
    session.running = object()
    assert table.expire(now=100.0) == 0
    session.running = None
    assert table.expire(now=18.9) == 0
    assert table.expire(now=19.1) == 1


def test_an_expired_name_may_be_opened_again():
    table = Table()
    table.enter(ME, opening(), now=0.0)
    table.expire(now=50.0)
    assert table.enter(ME, opening(), now=51.0).next_step == 1


def test_closing_frees_all_and_closing_again_is_no_error():
    table = Table()
    table.enter(ME, opening(rows=4), now=0.0)
    for _ in range(2):
        table.close(ME, CloseMessage(1))
    assert len(table) == 0
    assert table.kv.free_bytes == table.kv.total_bytes


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (step(2, open=OpenSession()), MessageError),
        (opening(session=0), MessageError),
        (opening(keep_positions=1), MessageError),
        (opening(select_rows=(0,)), MessageError),
        (opening(tokens=9), SessionTooLong),
        (opening(rows=7), KvBudgetExceeded),
        (step(1, open=OpenSession(adapter=Versions("notes", 1))), AdapterError),
    ],
)
def test_a_session_that_cannot_be_opened_so_takes_nothing(message, kind):
    table = Table()
    with pytest.raises(kind):
        table.enter(ME, message, now=0.0)
    assert len(table) == 0
    assert table.kv.free_bytes == table.kv.total_bytes


def test_sessions_are_counted_against_the_limit():
    table = Table(max_sessions=1)
    table.enter(ME, opening(1), now=0.0)
    with pytest.raises(ResourceExhausted, match="1 sessions are open"):
        table.enter(ME, opening(2), now=0.0)


def test_a_step_that_took_longer_than_the_lease_does_not_expire_its_own_session():
    table = Table()
    session = table.enter(ME, opening(), now=0.0)
    done(table, session, opening(), now=25.0)
    assert table.expire(now=25.1) == 0


def test_sessions_of_a_client_that_is_gone_are_kept_for_a_short_while():
    table = Table(lease_s=1000.0, orphan_lease_s=5.0)
    mine, yours = (table.enter(who, opening(), now=0.0) for who in (ME, YOU))
    for session in (mine, yours):
        done(table, session, opening())
    table.shorten_leases(ME, now=10.0)
    assert table.expire(now=14.9) == 0
    table.enter(ME, step(2), now=14.9)
    assert table.expire(now=15.1) == 0, "it came back"
    table.shorten_leases(ME, now=20.0)
    assert table.expire(now=25.1) == 1
    assert table.find((YOU, 1), 0) is yours
