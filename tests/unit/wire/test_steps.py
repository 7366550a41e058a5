"""A step arrives as it was sent, costs few bytes beside its tensor, and is checked on arrival."""

import pytest
import torch

from splitlearn.config import WireLimits
from splitlearn.errors import FrameError, KvBudgetExceeded, MessageError, StepOutOfOrder
from splitlearn.vocabulary import CodecId, Phase, Precision, Role, StepKey, Timings, Versions
from splitlearn.wire.frames import FrameFormat, encode_frame
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.messages import AnswerMessage, ForkMessage, OpenSession, StepMessage
from splitlearn.wire.steps import (
    answer_from_proto,
    answer_to_proto,
    fork_from_proto,
    fork_to_proto,
    key_from_proto,
    step_from_proto,
    step_to_proto,
)

HIDDEN = 8
RAW = FrameFormat()
LIMITS = WireLimits(max_rows=16, max_tokens=64)


def a_step(**changes) -> StepMessage:
    fields = {
        "key": StepKey(session=7, incarnation=2, step=3),
        "activation_BTD": torch.randn(2, 3, HIDDEN),
        "open": OpenSession(
            adapter=Versions("notes", 4), follow=True, precision=Precision("float32", "", "bfloat16")
        ),
        "mask_columns_BT": torch.tensor([[True, True, False], [True, True, True]]),
        "positions_BT": torch.tensor([[0, 1, 1], [0, 1, 2]]),
        "keep_positions": 0,
        "select_rows": (1, 0),
        "acked_through": 2,
        "deadline_s": 60.0,
        "priority": -1,
    }
    return StepMessage(**(fields | changes))


def sent(step: StepMessage) -> pb.Step:
    return pb.Step.FromString(step_to_proto(step, RAW).SerializeToString())


def received(proto: pb.Step) -> StepMessage:
    return step_from_proto(proto, HIDDEN, LIMITS)


def test_every_field_of_a_step_arrives():
    step = a_step()
    arrived = received(sent(step))
    for tensor in ("activation_BTD", "mask_columns_BT", "positions_BT"):
        assert torch.equal(getattr(arrived, tensor), getattr(step, tensor))
    for plain in ("key", "open", "keep_positions", "select_rows", "acked_through", "deadline_s", "priority"):
        assert getattr(arrived, plain) == getattr(step, plain)


def test_what_a_step_leaves_out_arrives_as_left_out():
    arrived = received(sent(StepMessage(StepKey(session=1, step=1), torch.zeros(1, 1, HIDDEN))))
    assert arrived.open is arrived.mask_columns_BT is arrived.positions_BT is None
    assert arrived.keep_positions is None, "0 would empty the session"
    assert arrived.select_rows is None


def test_a_decode_step_costs_little_beside_its_tensor():
    """SmolLM2's activation in bf16 is 1,152 bytes; both directions together stay under 8 %."""
    activation = torch.zeros(1, 1, 576, dtype=torch.bfloat16)
    key = StepKey(session=2**32 - 1, step=1000)
    step = StepMessage(key, activation, acked_through=999, deadline_s=60.0)
    answer = AnswerMessage(key, activation, Timings(300, 70_000, 100))
    there = pb.ClientMessage(step=step_to_proto(step, RAW)).ByteSize()
    back = pb.ServerMessage(answer=answer_to_proto(answer, RAW)).ByteSize()
    assert there + back - 2 * 1152 < 0.08 * 2 * 1152


WRONG = {
    "no activation": (lambda p: p.ClearField("activation"), FrameError),
    "no rows": (lambda p: p.activation.shape.__setitem__(0, 0), FrameError),
    "too many rows": (lambda p: p.activation.shape.__setitem__(0, 17), FrameError),
    "too many tokens": (lambda p: p.activation.shape.__setitem__(1, 64), FrameError),
    "another hidden size": (lambda p: p.activation.shape.__setitem__(2, 9), FrameError),
    "both a session and a run": (lambda p: setattr(p.key, "run", 1), MessageError),
    "a phase of a later version": (lambda p: setattr(p.key, "phase", 50), MessageError),
    "a deadline that is no number": (lambda p: setattr(p, "deadline_s", float("nan")), MessageError),
    "a deadline without end": (lambda p: setattr(p, "deadline_s", float("inf")), MessageError),
    "a negative deadline": (lambda p: setattr(p, "deadline_s", -1.0), MessageError),
    "more selected rows than rows": (lambda p: p.select_rows.append(0), MessageError),
    "a selected row beyond all limits": (lambda p: p.select_rows.__setitem__(0, 2**31), MessageError),
    "a crop beyond all limits": (lambda p: setattr(p, "keep_positions", 2**40), MessageError),
    "a mask of another shape": (
        lambda p: p.mask_columns.CopyFrom(
            encode_frame(torch.ones(2, 4, dtype=torch.bool), Role.MASK_COLUMNS, RAW)
        ),
        FrameError,
    ),
    "a mask in floats": (
        lambda p: p.mask_columns.CopyFrom(encode_frame(torch.ones(2, 3), Role.MASK_COLUMNS, RAW)),
        FrameError,
    ),
    "a negative position": (
        lambda p: p.positions.CopyFrom(
            encode_frame(torch.full((2, 3), -1, dtype=torch.int32), Role.POSITIONS, RAW)
        ),
        MessageError,
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_step_that_is_malformed_is_refused(what):
    change, kind = WRONG[what]
    proto = sent(a_step())
    received(proto)
    change(proto)
    with pytest.raises(kind):
        received(proto)


def test_an_answer_arrives_with_its_timings_and_version():
    answer = AnswerMessage(
        StepKey(session=1, step=2), torch.randn(1, 1, HIDDEN), Timings(1, 2, 3), Versions("notes", 9)
    )
    arrived = answer_from_proto(answer_to_proto(answer, FrameFormat(CodecId.RAW)), (1, 1, HIDDEN))
    assert torch.equal(arrived.activation_BTD, answer.activation_BTD)
    assert (arrived.key, arrived.timings, arrived.versions) == (answer.key, answer.timings, answer.versions)


def test_an_error_arrives_as_the_class_that_was_raised_with_its_figures():
    full = KvBudgetExceeded("no room", facts={"wanted_bytes": 10, "free_bytes": 5})
    arrived = answer_from_proto(
        answer_to_proto(AnswerMessage(StepKey(step=1), error=full), RAW), (1, 1, HIDDEN)
    )
    assert type(arrived.error) is KvBudgetExceeded
    assert arrived.error.message == "no room"
    assert arrived.error.facts == {"wanted_bytes": 10, "free_bytes": 5}


def test_a_step_out_of_order_carries_the_step_that_comes_next():
    late = AnswerMessage(StepKey(step=1), error=StepOutOfOrder("no", facts={"current_step": 12}))
    arrived = answer_from_proto(answer_to_proto(late, RAW), (1, 1, HIDDEN))
    assert arrived.error.facts["current_step"] == 12


def test_an_answer_of_another_shape_than_was_asked_for_is_refused():
    proto = answer_to_proto(AnswerMessage(StepKey(step=1), torch.zeros(1, 2, HIDDEN)), RAW)
    with pytest.raises(FrameError):
        answer_from_proto(proto, (1, 1, HIDDEN))


def test_a_fork_names_two_sessions():
    fork = ForkMessage(3, 4, incarnation=1, at_step=9)
    assert fork_from_proto(fork_to_proto(fork)) == fork
    with pytest.raises(MessageError):
        fork_from_proto(pb.ForkSession(session=3, into=3))


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_has_its_place_in_the_protocol(phase):
    assert key_from_proto(pb.StepKey(phase=phase.name)).phase is phase
