"""A session that moves, as protobuf: what it is, then its keys and values in parts of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from splitlearn.config import WireLimits
from splitlearn.errors import FrameError, MessageError
from splitlearn.vocabulary import Role, Versions
from splitlearn.wire.boxes import Box, BoxOrder, boxes_of
from splitlearn.wire.frames import FrameFormat, decode_frame, encode_frame
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.handshake import ModelIdentity, identity_from_proto, identity_to_proto
from splitlearn.wire.messages import SessionHead, SessionPart
from splitlearn.wire.precision import precision_from_proto, precision_to_proto

# B rows   H key/value heads   T tokens   L tokens of a row   E head size

FORMAT = FrameFormat()
"""Always as they are, and checked: these are no activations."""
ANY = (None, None, None, None)
KeysAndValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class MovedSession:
    """All of a session that the server held, on its way to another one or to the disk.

    `layers` are keys and values (B, H, L, E) by the trunk's own count; `visible_BL` says which tokens
    may be looked at.
    """

    identity: ModelIdentity
    head: SessionHead
    layers: tuple[KeysAndValues, ...]
    visible_BL: Tensor

    def parts(self, part_bytes: int) -> Iterator[SessionPart]:
        sizes = [_position_bytes(keys) + _position_bytes(values) for keys, values in self.layers]
        for box in boxes_of(self.head.rows, self.head.length, sizes, part_bytes):
            rows, positions = box.row_range, box.position_range
            keys, values = (each[rows, :, positions] for each in self.layers[box.layer])
            visible_BT = self.visible_BL[rows, positions] if box.layer == 0 else None
            yield SessionPart(box.layer, box.first_row, box.first_position, keys, values, visible_BT)


def _position_bytes(held_BHLE: Tensor) -> int:
    return held_BHLE.shape[1] * held_BHLE.shape[3] * held_BHLE.itemsize


def head_to_proto(
    head: SessionHead, identity: ModelIdentity, session: int = 0, client: bytes = b""
) -> pb.SessionPart:
    """The first part."""
    return pb.SessionPart(
        session=session,
        client=client,
        fingerprint=identity_to_proto(identity),
        rows=head.rows,
        length=head.length,
        next_step=head.next_step,
        adapter=pb.AdapterVersion(
            adapter=head.adapter.adapter, version=head.adapter.version, follow=head.follow
        ),
        adapter_digest=head.adapter_digest,
        precision=precision_to_proto(head.precision),
    )


def head_from_proto(proto: pb.SessionPart, limits: WireLimits) -> SessionHead:
    """Raises MessageError for a size that no session has."""
    if not 1 <= proto.rows <= limits.max_rows:
        raise MessageError(f"a session of {proto.rows} rows is moved; 1 to {limits.max_rows} are taken here")
    if not 1 <= proto.rows * proto.length <= limits.max_tokens:
        raise MessageError(
            f"a session of {proto.rows} x {proto.length} tokens is moved; 1 to {limits.max_tokens} are taken"
        )
    return SessionHead(
        rows=proto.rows,
        length=proto.length,
        next_step=proto.next_step,
        adapter=Versions(proto.adapter.adapter, proto.adapter.version),
        adapter_digest=proto.adapter_digest,
        follow=proto.adapter.follow,
        precision=precision_from_proto(proto.precision),
    )


def part_to_proto(part: SessionPart) -> pb.SessionPart:
    proto = pb.SessionPart(
        layer=part.layer,
        first_row=part.first_row,
        first_position=part.first_position,
        keys=encode_frame(part.keys_BHTE.contiguous(), Role.KEYS, FORMAT),
        values=encode_frame(part.values_BHTE.contiguous(), Role.VALUES, FORMAT),
    )
    visible_BT = part.visible_BT
    if visible_BT is not None and not bool(visible_BT.all()):
        proto.mask_columns.CopyFrom(encode_frame(visible_BT.contiguous(), Role.MASK_COLUMNS, FORMAT))
    return proto


class ArrivingParts:
    """Checks the parts one by one: each is the next, of the size that it says, with its checksum."""

    def __init__(self, head: SessionHead, layers: int) -> None:
        self._order = BoxOrder(layers, head.rows, head.length)

    def take(self, proto: pb.SessionPart) -> SessionPart:
        """The part that arrived.

        Raises:
            MessageError: it is not the next one, or says wrongly that it is the last.
            FrameError: a tensor is malformed; CorruptFrame: its bytes changed on the way.
        """
        keys_BHTE = decode_frame(proto.keys, Role.KEYS, ANY)
        values_BHTE = decode_frame(proto.values, Role.VALUES, ANY)
        rows, _, positions, _ = keys_BHTE.shape
        if keys_BHTE.shape[:3] != values_BHTE.shape[:3] or keys_BHTE.dtype != values_BHTE.dtype:
            raise FrameError(
                f"a part has keys of shape {list(keys_BHTE.shape)} and values of {list(values_BHTE.shape)}, "
                f"in {keys_BHTE.dtype} and {values_BHTE.dtype}: they differ in more than their last dimension"
            )
        self._order.take(Box(proto.layer, proto.first_row, rows, proto.first_position, positions))
        if proto.last != self._order.is_complete:
            raise MessageError("a moved session's parts end too soon or too late: export it again")
        visible_BT = None
        if proto.HasField("mask_columns"):
            visible_BT = decode_frame(proto.mask_columns, Role.MASK_COLUMNS, (rows, positions))
        return SessionPart(
            proto.layer, proto.first_row, proto.first_position, keys_BHTE, values_BHTE, visible_BT
        )

    @property
    def is_complete(self) -> bool:
        return self._order.is_complete


def session_to_parts(
    moved: MovedSession, session: int, client: bytes, part_bytes: int
) -> Iterator[pb.SessionPart]:
    """A whole session as it is sent to be imported."""
    order = BoxOrder(len(moved.layers), moved.head.rows, moved.head.length)
    yield head_to_proto(moved.head, moved.identity, session, client)
    for part in moved.parts(part_bytes):
        proto = part_to_proto(part)
        rows, _, positions, _ = part.keys_BHTE.shape
        order.take(Box(part.layer, part.first_row, rows, part.first_position, positions))
        proto.last = order.is_complete
        yield proto


def session_from_parts(protos: Iterable[pb.SessionPart], layers: int, limits: WireLimits) -> MovedSession:
    """A whole session as it arrived from an export.

    Raises:
        MessageError, FrameError, CorruptFrame: a part is not what it should be, or none is the last.
    """
    arriving = iter(protos)
    first = next(arriving, None)
    if first is None:
        raise MessageError(ENDED)
    head = head_from_proto(first, limits)
    parts = ArrivingParts(head, layers)
    collected = Collected(head, layers)
    while not parts.is_complete:
        if (proto := next(arriving, None)) is None:
            raise MessageError(ENDED)
        collected.add(parts.take(proto))
    return collected.joined(identity_from_proto(first.fingerprint))


ENDED = "a session's last part did not come: export it again"


class Collected:
    """Parts as they come, until they are joined to layers."""

    def __init__(self, head: SessionHead, layers: int) -> None:
        self._head = head
        self._visible_BL = torch.ones(head.rows, head.length, dtype=torch.bool)
        self._rows: list[list[list[KeysAndValues]]] = [[] for _ in range(layers)]

    def add(self, part: SessionPart) -> None:
        """Raises FrameError where a part does not fit those before it in its layer."""
        rows = self._rows[part.layer]
        found = (part.keys_BHTE, part.values_BHTE)
        if rows and any(_form(new) != _form(old) for new, old in zip(found, rows[0][0], strict=True)):
            raise FrameError(
                f"the parts of layer {part.layer} do not fit each other: export the session again"
            )
        if part.first_position:
            rows[-1].append(found)
        else:
            rows.append([found])
        if part.visible_BT is not None:
            count, positions = part.visible_BT.shape
            there = slice(part.first_row, part.first_row + count)
            self._visible_BL[there, part.first_position : part.first_position + positions] = part.visible_BT

    def joined(self, identity: ModelIdentity) -> MovedSession:
        layers = []
        for rows in self._rows:
            layers.append((_joined(rows, 0), _joined(rows, 1)))
            rows.clear()
        return MovedSession(identity, self._head, tuple(layers), self._visible_BL)


def _joined(rows: list[list[KeysAndValues]], which: int) -> Tensor:
    return torch.cat([torch.cat([piece[which] for piece in row], dim=2) for row in rows])


def _form(held_BHTE: Tensor) -> tuple[object, ...]:
    return held_BHTE.dtype, held_BHTE.shape[1], held_BHTE.shape[3]
