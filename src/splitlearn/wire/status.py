"""Errors on the wire: the class that a server raises is the class that its client receives."""

from __future__ import annotations

import math

from splitlearn import errors
from splitlearn.errors import SplitLearnError, StepOutOfOrder, TrunkFailed
from splitlearn.wire.generated import splitlearn_pb2 as pb

MAX_MESSAGE_CHARACTERS = 2000
DETAIL_KEY = "splitlearn-error-bin"

CLASSES: dict[pb.ErrorCode, type[SplitLearnError]] = {
    pb.SETTING: errors.SettingError,
    pb.UNSUPPORTED_MODEL: errors.UnsupportedModel,
    pb.UNSUPPORTED_CALL: errors.UnsupportedCall,
    pb.ADAPTER: errors.AdapterError,
    pb.TRUNK_DRAINING: errors.TrunkDraining,
    pb.PROTOCOL_MISMATCH: errors.ProtocolMismatch,
    pb.MODEL_MISMATCH: errors.ModelMismatch,
    pb.SPLIT_MISMATCH: errors.SplitMismatch,
    pb.ACCESS_DENIED: errors.AccessDenied,
    pb.FRAME: errors.FrameError,
    pb.CORRUPT_FRAME: errors.CorruptFrame,
    pb.MESSAGE: errors.MessageError,
    pb.STEP_OUT_OF_ORDER: errors.StepOutOfOrder,
    pb.SESSION_LOST: errors.SessionLost,
    pb.SESSION_EXPIRED: errors.SessionExpired,
    pb.SESSION_TOO_LONG: errors.SessionTooLong,
    pb.RESOURCE_EXHAUSTED: errors.ResourceExhausted,
    pb.KV_BUDGET_EXCEEDED: errors.KvBudgetExceeded,
    pb.STEP_TIMEOUT: errors.StepTimeout,
    pb.NOT_SERVED: errors.NotServed,
    pb.TRUNK_FAILED: errors.TrunkFailed,
    pb.RUN_LOST: errors.RunLost,
    pb.TAPE_EXPIRED: errors.TapeExpired,
    pb.STALE_GRADIENT: errors.StaleGradient,
    pb.CHECKPOINT: errors.CheckpointError,
    pb.RUN_BROKEN: errors.RunBroken,
    pb.RUN_TAKEN_OVER: errors.RunTakenOver,
    pb.ROUND_UNFINISHED: errors.RoundUnfinished,
    pb.CONTRIBUTION_LOST: errors.ContributionLost,
}
CODES = {kind: code for code, kind in CLASSES.items()}


def error_to_proto(error: SplitLearnError) -> pb.Error:
    """The error as it is sent: its words and its figures, nothing of the server's stack."""
    code = pb.ErrorCode.Name(_code_of(type(error)))
    proto = pb.Error(code=code, message=error.message[:MAX_MESSAGE_CHARACTERS])
    for name, value in error.facts.items():
        if name == "current_step":
            proto.current_step = int(value)
        elif name == "retry_after_ms":
            proto.retry_after_ms = int(value)
        elif isinstance(value, int | float):
            proto.figures[name] = value
    return proto


def error_from_proto(proto: pb.Error) -> SplitLearnError:
    """The class that was raised there; a code of a newer version becomes `TrunkFailed`."""
    kind = CLASSES.get(proto.code, TrunkFailed)
    facts: dict[str, str | int | float] = {
        name: int(value) if math.isfinite(value) and value == int(value) else value
        for name, value in proto.figures.items()
    }
    if kind is StepOutOfOrder:
        facts["current_step"] = proto.current_step
    if proto.retry_after_ms:
        facts["retry_after_ms"] = proto.retry_after_ms
    return kind(proto.message[:MAX_MESSAGE_CHARACTERS], facts=facts)


def _code_of(kind: type[SplitLearnError]) -> pb.ErrorCode:
    """The code of the class or of its nearest ancestor that has one."""
    for ancestor in kind.__mro__:
        if ancestor in CODES:
            return CODES[ancestor]
    return pb.TRUNK_FAILED
