"""Steps and answers as protobuf, both ways; what arrives is checked here, before the engine sees it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from splitlearn.config import WireLimits
from splitlearn.errors import FrameError, MessageError
from splitlearn.vocabulary import Phase, Precision, Role, StepKey, Timings, Versions
from splitlearn.wire.dtypes import dtype_name, dtype_named
from splitlearn.wire.frames import DTYPE_IDS, DTYPES, FrameFormat, decode_frame, encode_frame
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.messages import (
    AnswerMessage,
    CloseMessage,
    ForkMessage,
    OpenSession,
    OptimizerStep,
    RunStepMessage,
    StepMessage,
)
from splitlearn.wire.status import error_from_proto, error_to_proto

MAX_POSITION = 1 << 31
MAX_DEADLINE_S = 24 * 3600.0

# B rows   T tokens   D hidden


def step_to_proto(step: StepMessage, format: FrameFormat) -> pb.Step:
    """A step as it is sent; fields at their default take no bytes."""
    proto = pb.Step(
        key=key_to_proto(step.key),
        activation=encode_frame(step.activation_BTD, Role.ACTIVATION, format),
        acked_through=step.acked_through,
        keep_positions=step.keep_positions,
        select_rows=step.select_rows,
        deadline_s=step.deadline_s,
        priority=step.priority,
    )
    if step.open is not None:
        proto.open.CopyFrom(_open_to_proto(step.open))
    _add_sides(proto, step.mask_columns_BT, step.positions_BT, format)
    return proto


def step_from_proto(
    proto: pb.Step,
    hidden_size: int,
    limits: WireLimits,
    *,
    checksum: bool = True,
    payload: Tensor | None = None,
) -> StepMessage:
    """The step that arrived, and its activation's bytes (N,) if they came behind it.

    Raises:
        FrameError: a tensor is malformed; CorruptFrame: its bytes changed on the way.
        MessageError: fields contradict each other.
        NotServed: the phase belongs to a run.
    """
    key = key_from_proto(proto.key)
    rows, tokens = _size(proto.activation, limits)
    shape = (rows, tokens, hidden_size)
    activation = decode_frame(proto.activation, Role.ACTIVATION, shape, checksum=checksum, payload=payload)
    return StepMessage(
        key=key,
        activation_BTD=activation,
        open=_open_from_proto(proto.open) if proto.HasField("open") else None,
        mask_columns_BT=_side(proto, "mask_columns", Role.MASK_COLUMNS, rows, tokens, checksum),
        positions_BT=_positions(proto, rows, tokens, checksum),
        keep_positions=_keep_positions(proto),
        select_rows=_select_rows(proto, rows, limits),
        acked_through=proto.acked_through,
        deadline_s=_deadline(proto.deadline_s),
        priority=proto.priority,
    )


def run_step_to_proto(step: RunStepMessage, format: FrameFormat) -> pb.Step:
    """A run's step as it is sent."""
    proto = pb.Step(
        key=key_to_proto(step.key),
        deadline_s=step.deadline_s,
        want_input_gradient=step.want_input_gradient,
        loss_scale=step.loss_scale,
        seed=step.seed,
        acked_through=step.acked_through,
    )
    if step.tensor_BTD is not None:
        proto.activation.CopyFrom(encode_frame(step.tensor_BTD, _sent(step.key.phase), format))
    _add_sides(proto, step.mask_columns_BT, step.positions_BT, format)
    if (optimizer := step.optimizer) is not None:
        proto.optimizer.gradient_scale = optimizer.gradient_scale
        proto.optimizer.learning_rate = optimizer.learning_rate
        proto.optimizer.skip = optimizer.skip
    return proto


def run_step_from_proto(
    proto: pb.Step,
    hidden_size: int,
    limits: WireLimits,
    *,
    checksum: bool = True,
    payload: Tensor | None = None,
) -> RunStepMessage:
    """The run's step that arrived, and its tensor's bytes (N,) if they came behind it.

    Raises:
        FrameError: a tensor is malformed; CorruptFrame: its bytes changed on the way.
        MessageError: fields contradict each other, or the phase.
    """
    key = key_from_proto(proto.key)
    tensor, rows, tokens = None, 0, 0
    if key.phase in (Phase.FORWARD, Phase.EVALUATE, Phase.BACKWARD):
        rows, tokens = _size(proto.activation, limits)
        shape = (rows, tokens, hidden_size)
        tensor = decode_frame(proto.activation, _sent(key.phase), shape, checksum=checksum, payload=payload)
    return RunStepMessage(
        key=key,
        tensor_BTD=tensor,
        mask_columns_BT=_side(proto, "mask_columns", Role.MASK_COLUMNS, rows, tokens, checksum),
        positions_BT=_positions(proto, rows, tokens, checksum),
        want_input_gradient=proto.want_input_gradient,
        loss_scale=_loss_scale(proto),
        seed=proto.seed,
        optimizer=_optimizer(proto) if key.phase is Phase.OPTIMIZER_STEP else None,
        acked_through=proto.acked_through,
        deadline_s=_deadline(proto.deadline_s),
    )


def answer_to_proto(answer: AnswerMessage, format: FrameFormat) -> pb.Answer:
    proto = pb.Answer(key=key_to_proto(answer.key))
    if answer.error is not None:
        proto.error.CopyFrom(error_to_proto(answer.error))
        return proto
    if answer.activation_BTD is not None:
        proto.activation.CopyFrom(encode_frame(answer.activation_BTD, _sent(answer.key.phase), format))
    if answer.norms is not None:
        proto.norms.CopyFrom(encode_frame(answer.norms, Role.NORMS, FrameFormat(checksum=format.checksum)))
    proto.stepped = answer.stepped
    timings = answer.timings
    proto.timings.queued_us = timings.queued_us
    proto.timings.device_us = timings.device_us
    proto.timings.copied_us = timings.copied_us
    if answer.versions.version:
        proto.adapter.adapter = answer.versions.adapter
        proto.adapter.version = answer.versions.version
    return proto


def answer_from_proto(
    proto: pb.Answer,
    shape: tuple[int, int, int] | None,
    *,
    checksum: bool = True,
    payload: Tensor | None = None,
) -> AnswerMessage:
    """The answer to a step; `shape` (B, T, D) is what its activation must have, None where none is due.

    `payload` (N,) are the activation's bytes, if they came behind the message.
    """
    key = key_from_proto(proto.key)
    if proto.HasField("error"):
        return AnswerMessage(key, error=error_from_proto(proto.error))
    timings = proto.timings
    return AnswerMessage(
        key=key,
        activation_BTD=decode_frame(
            proto.activation, _sent(key.phase), shape, checksum=checksum, payload=payload
        )
        if shape is not None
        else None,
        timings=Timings(timings.queued_us, timings.device_us, timings.copied_us),
        versions=Versions(proto.adapter.adapter, proto.adapter.version),
        norms=_norms(proto, checksum),
        stepped=proto.stepped,
    )


def key_to_proto(key: StepKey) -> pb.StepKey:
    return pb.StepKey(
        session=key.session,
        run=key.run,
        step=key.step,
        incarnation=key.incarnation,
        microbatch=key.microbatch,
        phase=key.phase.name,
    )


def key_from_proto(proto: pb.StepKey) -> StepKey:
    """Raises MessageError where the key names both a session and a run, or an unknown phase."""
    try:
        phase = Phase(proto.phase)
    except ValueError:
        raise MessageError(f"phase {proto.phase} is not in the protocol") from None
    if proto.session and proto.run:
        raise MessageError("a step belongs to a session or to a run, not to both")
    return StepKey(
        session=proto.session,
        run=proto.run,
        incarnation=proto.incarnation,
        step=proto.step,
        microbatch=proto.microbatch,
        phase=phase,
    )


def fork_to_proto(fork: ForkMessage) -> pb.ForkSession:
    return pb.ForkSession(
        session=fork.session, into=fork.into, incarnation=fork.incarnation, at_step=fork.at_step
    )


def fork_from_proto(proto: pb.ForkSession) -> ForkMessage:
    if not proto.session or not proto.into or proto.session == proto.into:
        raise MessageError("a fork names two different sessions, neither of them 0")
    return ForkMessage(proto.session, proto.into, proto.incarnation, proto.at_step)


def close_from_proto(proto: pb.CloseSession) -> CloseMessage:
    return CloseMessage(proto.session, proto.incarnation)


def precision_to_proto(precision: Precision) -> pb.Precision:
    return pb.Precision(
        weights=_dtype_id(precision.weights),
        autocast=_dtype_id(precision.autocast),
        wire=_dtype_id(precision.wire),
    )


def precision_from_proto(proto: pb.Precision) -> Precision:
    return Precision(
        weights=_name_of(proto.weights), autocast=_name_of(proto.autocast), wire=_name_of(proto.wire)
    )


def _sent(phase: Phase) -> Role:
    """What a step of this phase, and its answer, carry."""
    return Role.GRADIENT if phase is Phase.BACKWARD else Role.ACTIVATION


def _add_sides(
    proto: pb.Step, mask_columns_BT: Tensor | None, positions_BT: Tensor | None, format: FrameFormat
) -> None:
    format = replace(format, apart=None)
    if mask_columns_BT is not None:
        proto.mask_columns.CopyFrom(encode_frame(mask_columns_BT, Role.MASK_COLUMNS, format))
    if positions_BT is not None:
        positions = positions_BT.to(torch.int32)
        proto.positions.CopyFrom(encode_frame(positions, Role.POSITIONS, format))


def _loss_scale(proto: pb.Step) -> float:
    if not math.isfinite(proto.loss_scale) or proto.loss_scale < 0:
        raise MessageError(f"a loss scale of {proto.loss_scale}: it must be a positive number")
    return proto.loss_scale or 1.0


def _optimizer(proto: pb.Step) -> OptimizerStep | None:
    if not proto.HasField("optimizer"):
        return None
    step = proto.optimizer
    if not all(math.isfinite(each) and each >= 0 for each in (step.gradient_scale, step.learning_rate)):
        raise MessageError("an optimizer step's scale and learning rate are finite numbers, none below 0")
    return OptimizerStep(step.gradient_scale, step.learning_rate, step.skip)


def _norms(proto: pb.Answer, checksum: bool) -> Tensor | None:
    if not proto.HasField("norms"):
        return None
    return decode_frame(proto.norms, Role.NORMS, (None,), checksum=checksum)


def _dtype_id(name: str) -> pb.DType:
    return DTYPE_IDS[dtype_named(name)] if name else pb.DTYPE_UNSPECIFIED


def _name_of(wire_id: pb.DType) -> str:
    if wire_id == pb.DTYPE_UNSPECIFIED:
        return ""
    if wire_id not in DTYPES:
        raise MessageError(f"dtype {wire_id} is not in the protocol")
    return dtype_name(DTYPES[wire_id])


def _open_to_proto(open: OpenSession) -> pb.OpenSession:
    return pb.OpenSession(
        adapter=pb.AdapterVersion(
            adapter=open.adapter.adapter, version=open.adapter.version, follow=open.follow
        ),
        precision=precision_to_proto(open.precision),
    )


def _open_from_proto(proto: pb.OpenSession) -> OpenSession:
    return OpenSession(
        adapter=Versions(proto.adapter.adapter, proto.adapter.version),
        follow=proto.adapter.follow,
        precision=precision_from_proto(proto.precision),
    )


def _size(frame: pb.Frame, limits: WireLimits) -> tuple[int, int]:
    if len(frame.shape) != 3:
        raise FrameError(
            f"an activation has rows, tokens and hidden size, this has shape {list(frame.shape)[:8]}"
        )
    rows, tokens = frame.shape[0], frame.shape[1]
    if not 1 <= rows <= limits.max_rows:
        raise FrameError(f"a step of {rows} rows; this server takes 1 to {limits.max_rows}")
    if not 1 <= rows * tokens <= limits.max_tokens:
        raise FrameError(f"a step of {rows} x {tokens} tokens; this server takes 1 to {limits.max_tokens}")
    return rows, tokens


def _side(proto: pb.Step, field: str, role: Role, rows: int, tokens: int, checksum: bool) -> Tensor | None:
    if not proto.HasField(field):
        return None
    return decode_frame(getattr(proto, field), role, (rows, tokens), checksum=checksum)


def _positions(proto: pb.Step, rows: int, tokens: int, checksum: bool) -> Tensor | None:
    positions = _side(proto, "positions", Role.POSITIONS, rows, tokens, checksum)
    if positions is None:
        return None
    if positions.numel() and int(positions.min()) < 0:
        raise MessageError(f"a position of {int(positions.min())}; positions start at 0")
    return positions.long()


def _keep_positions(proto: pb.Step) -> int | None:
    if not proto.HasField("keep_positions"):
        return None
    if proto.keep_positions > MAX_POSITION:
        raise MessageError(f"keep_positions is {proto.keep_positions}, longer than any session")
    return proto.keep_positions


def _select_rows(proto: pb.Step, rows: int, limits: WireLimits) -> tuple[int, ...] | None:
    if not proto.select_rows:
        return None
    if len(proto.select_rows) != rows:
        raise MessageError(f"select_rows names {len(proto.select_rows)} rows, the activation has {rows}")
    if max(proto.select_rows) >= limits.max_rows:
        raise MessageError(
            f"select_rows names row {max(proto.select_rows)}, over the limit of {limits.max_rows}"
        )
    return tuple(proto.select_rows)


def _deadline(deadline_s: float) -> float:
    if not math.isfinite(deadline_s) or not 0 <= deadline_s <= MAX_DEADLINE_S:
        raise MessageError(f"a deadline of {deadline_s} s; it must lie between 0 and {MAX_DEADLINE_S:g}")
    return deadline_s
