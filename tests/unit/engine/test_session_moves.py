"""A session is exported as it stands and imported as a whole; nobody uses it in between."""

import time

import pytest
import torch

from splitlearn.config import BatchingConfig, SessionConfig
from splitlearn.engine.engine import Engine
from splitlearn.engine.session_moves import digest_of
from splitlearn.engine.trunk_state import BARE, AdapterVersion
from splitlearn.errors import (
    AdapterError,
    FrameError,
    MessageError,
    SessionLost,
    SettingError,
    StepOutOfOrder,
    TrunkDraining,
)
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.testing.tiny import tiny_model, tiny_whole
from splitlearn.vocabulary import Precision, StepKey, Versions
from splitlearn.wire.messages import CloseMessage, OpenSession, SessionHead, SessionPart, StepMessage

WAIT_S = 20
ME, YOU = b"me", b"you"
PART_BYTES = 500


@pytest.fixture(scope="module")
def trunk(tmp_path_factory) -> TrunkSegment:
    whole = tiny_whole(tiny_model("mistral", tmp_path_factory.mktemp("model")))
    return TrunkSegment.of_whole(whole, SplitPlan(6, 2, 2))


@pytest.fixture
def engine(trunk):
    made = Engine(
        trunk, BatchingConfig(), SessionConfig(kv_budget_bytes=1 << 18, session_tokens=64, lease_s=2.0)
    )
    made.start()
    yield made
    made.stop()


def tokens(count: int) -> torch.Tensor:
    return torch.randn(2, count, 32, generator=torch.Generator().manual_seed(count))


def ran(engine: Engine, number: int, count: int, session: int = 1, client: bytes = ME, **fields):
    message = StepMessage(StepKey(session=session, step=number), tokens(count), **fields)
    answer = engine.submit(client, message).result(WAIT_S)
    if answer.error is not None:
        raise answer.error
    return answer.activation_BTD


def begun(engine: Engine) -> None:
    padding = torch.tensor([[True] * 12, [False] * 3 + [True] * 9])
    ran(engine, 1, 12, open=OpenSession(), mask_columns_BT=padding)


def exported(engine: Engine, id=(ME, 1)) -> tuple[SessionHead, list[SessionPart]]:
    head = engine.moves.head(id).result(WAIT_S)
    boxes = engine.moves.boxes(head, PART_BYTES)
    return head, [engine.moves.read(id, head, box).result(WAIT_S) for box in boxes]


def bring(engine: Engine, id, head: SessionHead, parts: list[SessionPart]) -> None:
    engine.moves.begin(id, head).result(WAIT_S)
    for part in parts:
        engine.moves.write(id, part).result(WAIT_S)
    engine.moves.finish(id).result(WAIT_S)


def test_a_session_goes_on_under_another_clients_name(engine):
    begun(engine)
    head, parts = exported(engine)
    assert (head.rows, head.length, head.next_step) == (2, 12, 2)
    assert len(parts) > 10
    bring(engine, (YOU, 9), head, parts)
    assert torch.equal(ran(engine, 1, 3, 9, YOU), ran(engine, 2, 3))


def test_an_arriving_session_can_only_be_closed(engine):
    begun(engine)
    head, parts = exported(engine)
    engine.moves.begin((YOU, 9), head).result(WAIT_S)
    with pytest.raises(SessionLost):
        ran(engine, 1, 1, 9, YOU)
    with pytest.raises(SessionLost):
        engine.moves.head((YOU, 9)).result(WAIT_S)
    with pytest.raises(MessageError):
        engine.moves.begin((YOU, 9), head).result(WAIT_S)
    engine.close(YOU, CloseMessage(9)).result(WAIT_S)
    with pytest.raises(SessionLost):
        engine.moves.write((YOU, 9), parts[0]).result(WAIT_S)
    assert engine.open_sessions == 1


def test_an_import_that_nobody_goes_on_with_expires(engine):
    begun(engine)
    head, parts = exported(engine)
    engine.moves.begin((YOU, 9), head).result(WAIT_S)
    engine.moves.write((YOU, 9), parts[0]).result(WAIT_S)
    until = time.monotonic() + WAIT_S
    while engine.open_sessions and time.monotonic() < until:
        time.sleep(0.05)
    assert engine.kv.free_bytes == engine.kv.total_bytes
    assert not any(layer.any() for layer in engine.kv.keys_SHLE)


def test_a_session_that_goes_on_meanwhile_is_not_exported_half_old_half_new(engine):
    begun(engine)
    head = engine.moves.head((ME, 1)).result(WAIT_S)
    first, second, *_ = engine.moves.boxes(head, PART_BYTES)
    engine.moves.read((ME, 1), head, first).result(WAIT_S)
    ran(engine, 2, 1)
    with pytest.raises(StepOutOfOrder):
        engine.moves.read((ME, 1), head, second).result(WAIT_S)


def test_a_part_that_does_not_fit_its_session_is_refused(engine):
    begun(engine)
    head, (part, *_) = exported(engine)
    engine.moves.begin((YOU, 9), head).result(WAIT_S)

    def brought(**fields) -> None:
        found = {name: getattr(part, name) for name in SessionPart.__slots__} | fields
        engine.moves.write((YOU, 9), SessionPart(**found)).result(WAIT_S)

    keys = part.keys_BHTE
    brought()
    with pytest.raises(MessageError):
        brought(layer=2)
    with pytest.raises(MessageError):
        brought(first_position=12)
    for wrong in ({"first_row": 2}, {"keys_BHTE": keys[:, :1]}, {"keys_BHTE": keys.double()}):
        with pytest.raises(FrameError):
            brought(**wrong)


def test_a_session_of_another_kind_takes_nothing(engine):
    head = SessionHead(rows=2, length=12, precision=Precision("float32"))
    wrong = {
        SettingError: SessionHead(2, 12, precision=Precision("bfloat16")),
        AdapterError: SessionHead(2, 12, adapter=Versions("notes", 1)),
        MessageError: head,
    }
    for kind, each in wrong.items():
        with pytest.raises(kind):
            engine.moves.begin((YOU, 0), each).result(WAIT_S)
    with pytest.raises(AdapterError, match="other weights"):
        engine.moves.begin((YOU, 1), SessionHead(2, 12, adapter_digest=5)).result(WAIT_S)
    engine.drain()
    with pytest.raises(TrunkDraining):
        engine.moves.begin((YOU, 1), head)
    assert engine.open_sessions == 0


def test_an_adapters_digest_is_that_of_its_weights():
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    found = digest_of(AdapterVersion("notes", "slot1", 1, weights))
    assert found == digest_of(AdapterVersion("notes", "slot2", 1, dict(reversed(weights.items()))))
    others = [
        weights | {"b": torch.zeros(2)},
        weights | {"a": torch.arange(6.0).view(3, 2)},
        {"a": weights["a"]},
    ]
    assert found not in {digest_of(AdapterVersion("notes", "slot1", 1, each)) for each in others}
    assert digest_of(BARE) == 0
