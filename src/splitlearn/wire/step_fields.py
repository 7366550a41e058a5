"""The fields of a step that arrived, each checked by itself."""

from __future__ import annotations

import math

from torch import Tensor

from splitlearn.config import WireLimits
from splitlearn.errors import FrameError, MessageError
from splitlearn.vocabulary import Role
from splitlearn.wire.frames import decode_frame
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.messages import OptimizerStep

MAX_POSITION = 1 << 31
MAX_DEADLINE_S = 24 * 3600.0
MAX_WEIGHT = 1e12

# B rows   T tokens


def size(frame: pb.Frame, limits: WireLimits) -> tuple[int, int]:
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


def side(proto: pb.Step, field: str, role: Role, rows: int, tokens: int, checksum: bool) -> Tensor | None:
    if not proto.HasField(field):
        return None
    return decode_frame(getattr(proto, field), role, (rows, tokens), checksum=checksum)


def positions(proto: pb.Step, rows: int, tokens: int, checksum: bool) -> Tensor | None:
    told_BT = side(proto, "positions", Role.POSITIONS, rows, tokens, checksum)
    if told_BT is None:
        return None
    if told_BT.numel() and int(told_BT.min()) < 0:
        raise MessageError(f"a position of {int(told_BT.min())}; positions start at 0")
    return told_BT.long()


def keep_positions(proto: pb.Step) -> int | None:
    if not proto.HasField("keep_positions"):
        return None
    if proto.keep_positions > MAX_POSITION:
        raise MessageError(f"keep_positions is {proto.keep_positions}, longer than any session")
    return proto.keep_positions


def select_rows(proto: pb.Step, rows: int, limits: WireLimits) -> tuple[int, ...] | None:
    if not proto.select_rows:
        return None
    if len(proto.select_rows) != rows:
        raise MessageError(f"select_rows names {len(proto.select_rows)} rows, the activation has {rows}")
    if max(proto.select_rows) >= limits.max_rows:
        raise MessageError(
            f"select_rows names row {max(proto.select_rows)}, over the limit of {limits.max_rows}"
        )
    return tuple(proto.select_rows)


def deadline(deadline_s: float) -> float:
    if not math.isfinite(deadline_s) or not 0 <= deadline_s <= MAX_DEADLINE_S:
        raise MessageError(f"a deadline of {deadline_s} s; it must lie between 0 and {MAX_DEADLINE_S:g}")
    return deadline_s


def loss_scale(proto: pb.Step) -> float:
    if not math.isfinite(proto.loss_scale) or proto.loss_scale < 0:
        raise MessageError(f"a loss scale of {proto.loss_scale}: it must be a positive number")
    return proto.loss_scale or 1.0


def optimizer(proto: pb.Step) -> OptimizerStep | None:
    if not proto.HasField("optimizer"):
        return None
    step = proto.optimizer
    if not all(math.isfinite(each) and each >= 0 for each in (step.gradient_scale, step.learning_rate)):
        raise MessageError("an optimizer step's scale and learning rate are finite numbers, none below 0")
    if not 0 <= proto.weight <= MAX_WEIGHT:
        raise MessageError(f"a weight of {proto.weight}: it must lie between 0 and {MAX_WEIGHT:g}")
    return OptimizerStep(step.gradient_scale, step.learning_rate, step.skip, proto.weight or 1.0)
