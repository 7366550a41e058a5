"""Steps and answers as protobuf, both ways; what arrives is checked here, before the engine sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from splitlearn.config import WireLimits
from splitlearn.errors import MessageError
from splitlearn.vocabulary import Phase, Role, StepKey, Timings, Versions
from splitlearn.wire import ends, step_fields
from splitlearn.wire.frames import FrameFormat, decode_frame, write_frame
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.merged import merged_from_proto, merged_to_proto
from splitlearn.wire.messages import (
    AnswerMessage,
    CloseMessage,
    ForkMessage,
    OpenSession,
    RunStepMessage,
    StepMessage,
)
from splitlearn.wire.precision import precision_from_proto, precision_to_proto
from splitlearn.wire.status import error_from_proto, error_to_proto

# B rows   T tokens   D hidden

PHASES: dict[pb.Phase, Phase] = {getattr(pb, phase.name): phase for phase in Phase}
PHASE_IDS = {phase: wire_id for wire_id, phase in PHASES.items()}


def step_to_proto(step: StepMessage, format: FrameFormat) -> pb.Step:
    """A step as it is sent; fields at their default take no bytes."""
    proto = pb.Step(
        key=key_to_proto(step.key),
        acked_through=step.acked_through,
        keep_positions=step.keep_positions,
        select_rows=step.select_rows,
        deadline_s=step.deadline_s,
        priority=step.priority,
    )
    write_frame(proto.activation, step.activation_BTD, Role.ACTIVATION, format)
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
    rows, tokens = step_fields.size(proto.activation, limits)
    shape = (rows, tokens, hidden_size)
    activation = decode_frame(proto.activation, Role.ACTIVATION, shape, checksum=checksum, payload=payload)
    return StepMessage(
        key=key,
        activation_BTD=activation,
        open=_open_from_proto(proto.open) if proto.HasField("open") else None,
        mask_columns_BT=step_fields.side(proto, "mask_columns", Role.MASK_COLUMNS, rows, tokens, checksum),
        positions_BT=step_fields.positions(proto, rows, tokens, checksum),
        keep_positions=step_fields.keep_positions(proto),
        select_rows=step_fields.select_rows(proto, rows, limits),
        acked_through=proto.acked_through,
        deadline_s=step_fields.deadline(proto.deadline_s),
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
    if step.ends_version is not None:
        proto.adapter.version = step.ends_version
    ends.write(proto.ends, step.ends, _ends_sent(step.key.phase), format)
    if step.tensor_BTD is not None:
        write_frame(proto.activation, step.tensor_BTD, _sent(step.key.phase), format)
    _add_sides(proto, step.mask_columns_BT, step.positions_BT, format)
    if (optimizer := step.optimizer) is not None:
        proto.optimizer.gradient_scale = optimizer.gradient_scale
        proto.optimizer.learning_rate = optimizer.learning_rate
        proto.optimizer.skip = optimizer.skip
        proto.weight = optimizer.weight
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
        rows, tokens = step_fields.size(proto.activation, limits)
        shape = (rows, tokens, hidden_size)
        tensor = decode_frame(proto.activation, _sent(key.phase), shape, checksum=checksum, payload=payload)
    return RunStepMessage(
        key=key,
        tensor_BTD=tensor,
        mask_columns_BT=step_fields.side(proto, "mask_columns", Role.MASK_COLUMNS, rows, tokens, checksum),
        positions_BT=step_fields.positions(proto, rows, tokens, checksum),
        want_input_gradient=proto.want_input_gradient,
        loss_scale=step_fields.loss_scale(proto),
        seed=proto.seed,
        optimizer=step_fields.optimizer(proto) if key.phase is Phase.OPTIMIZER_STEP else None,
        acked_through=proto.acked_through,
        deadline_s=step_fields.deadline(proto.deadline_s),
        ends=ends.read(proto.ends, _ends_sent(key.phase), checksum=checksum),
        ends_version=proto.adapter.version if proto.HasField("adapter") else None,
    )


def answer_to_proto(answer: AnswerMessage, format: FrameFormat) -> pb.Answer:
    proto = pb.Answer(key=key_to_proto(answer.key))
    if answer.error is not None:
        proto.error.CopyFrom(error_to_proto(answer.error))
        return proto
    if answer.activation_BTD is not None:
        write_frame(proto.activation, answer.activation_BTD, _sent(answer.key.phase), format)
    if answer.norms is not None:
        write_frame(proto.norms, answer.norms, Role.NORMS, FrameFormat(checksum=format.checksum))
    ends.write(proto.ends, answer.ends, Role.WEIGHT, format)
    proto.stepped = answer.stepped
    if answer.merged is not None:
        proto.merged.CopyFrom(merged_to_proto(answer.merged))
    timings, told = answer.timings, proto.timings
    told.queued_us, told.device_us, told.copied_us = timings.queued_us, timings.device_us, timings.copied_us
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
        merged=merged_from_proto(proto.merged) if proto.HasField("merged") else None,
        ends=ends.read(proto.ends, Role.WEIGHT, checksum=checksum),
    )


def key_to_proto(key: StepKey) -> pb.StepKey:
    return pb.StepKey(
        session=key.session,
        run=key.run,
        step=key.step,
        incarnation=key.incarnation,
        microbatch=key.microbatch,
        phase=PHASE_IDS[key.phase],
    )


def key_from_proto(proto: pb.StepKey) -> StepKey:
    """Raises MessageError where the key names both a session and a run, or an unknown phase."""
    if (phase := PHASES.get(proto.phase)) is None:
        raise MessageError(f"phase {proto.phase} is not in the protocol")
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


def _sent(phase: Phase) -> Role:
    """What a step of this phase, and its answer, carry."""
    return Role.GRADIENT if phase is Phase.BACKWARD else Role.ACTIVATION


def _ends_sent(phase: Phase) -> Role:
    return Role.WEIGHT if phase is Phase.ENDS else Role.GRADIENT


def _add_sides(
    proto: pb.Step, mask_columns_BT: Tensor | None, positions_BT: Tensor | None, format: FrameFormat
) -> None:
    if mask_columns_BT is None and positions_BT is None:
        return
    format = FrameFormat(format.codec, format.checksum)
    if mask_columns_BT is not None:
        write_frame(proto.mask_columns, mask_columns_BT, Role.MASK_COLUMNS, format)
    if positions_BT is not None:
        write_frame(proto.positions, positions_BT.to(torch.int32), Role.POSITIONS, format)


def _norms(proto: pb.Answer, checksum: bool) -> Tensor | None:
    if not proto.HasField("norms"):
        return None
    return decode_frame(proto.norms, Role.NORMS, (None,), checksum=checksum)


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
