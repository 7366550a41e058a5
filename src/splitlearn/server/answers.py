"""What a client is answered, as protobuf; what cannot be encoded is answered with why."""

from __future__ import annotations

import time

import structlog

from splitlearn.errors import SplitLearnError, TrunkFailed
from splitlearn.wire.frames import FrameFormat
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.messages import AnswerMessage
from splitlearn.wire.status import error_to_proto
from splitlearn.wire.steps import answer_to_proto

log = structlog.get_logger("splitlearn.server")
QUICK_BYTES = 64 << 10


def is_quick(answer: AnswerMessage) -> bool:
    """Whether there is no copy from a device to wait for, and little to write down."""
    activation_BTD = answer.activation_BTD
    return activation_BTD is None or (activation_BTD.is_cpu and activation_BTD.nbytes <= QUICK_BYTES)


def encoded(answer: AnswerMessage, format: FrameFormat) -> pb.ServerMessage:
    """With the time that the copy from the device and the codec took."""
    started = time.perf_counter()
    proto = answer_to_proto(answer, format)
    if answer.activation_BTD is not None:
        proto.timings.copied_us = int((time.perf_counter() - started) * 1e6)
    return pb.ServerMessage(answer=proto)


def not_encoded(key: pb.StepKey, error: Exception) -> pb.ServerMessage:
    """Its own words stay here: they may tell of the server's inside."""
    log.error("an answer could not be encoded", exc_info=error)
    return failed(key, TrunkFailed("the answer could not be sent; the server's log has the cause"))


def failed(key: pb.StepKey, error: SplitLearnError) -> pb.ServerMessage:
    return pb.ServerMessage(answer=pb.Answer(key=key, error=error_to_proto(error)))


def forked(session: int, error: BaseException | None) -> pb.ServerMessage:
    forked = pb.Forked(session=session)
    if isinstance(error, SplitLearnError):
        forked.error.CopyFrom(error_to_proto(error))
    return pb.ServerMessage(forked=forked)
