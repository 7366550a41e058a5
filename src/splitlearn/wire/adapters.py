"""An adapter's weights on the wire: parts of a stream, each a few named frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from splitlearn.errors import FrameError, MessageError
from splitlearn.vocabulary import Role
from splitlearn.wire.frames import FrameFormat, decode_frame, encode_frame
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.messages import AdapterMessage
from splitlearn.wire.runs import lora_from_proto, lora_to_proto, run_name

MAX_NAME = 512
MAX_WEIGHTS = 1 << 16
FORMAT = FrameFormat()
"""Always as they are, and checked: these are no activations."""


def adapter_to_parts(adapter: AdapterMessage, client: bytes, part_bytes: int) -> Iterator[pb.AdapterPart]:
    """In parts of about this size; a weight that is larger goes as several frames of its rows."""
    part = pb.AdapterPart(
        name=adapter.name, version=adapter.version, client=client, lora=lora_to_proto(adapter.lora)
    )
    for name, rows in _rows(adapter.weights, part_bytes):
        frame = encode_frame(rows, Role.WEIGHT, FORMAT)
        frame.name = name
        if part.weights and part.ByteSize() + frame.ByteSize() > part_bytes:
            yield part
            part = pb.AdapterPart()
        part.weights.append(frame)
    part.last = True
    yield part


def _rows(weights: Mapping[str, Tensor], part_bytes: int) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights.items():
        row_bytes = max(weight.nbytes // max(len(weight), 1), 1)
        for rows in torch.split(weight, max(part_bytes // row_bytes, 1)):
            yield name, rows


class AdapterAssembly:
    """Puts the parts together, checked one by one, up to a limit of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._first: pb.AdapterPart | None = None
        self._weights: dict[str, list[Tensor]] = {}
        self._last_name = ""
        self.client = b""

    def add(self, part: pb.AdapterPart) -> AdapterMessage | None:
        """The adapter, once its last part is here.

        Raises:
            MessageError: names are missing, twice there or too many, or it grows over the limit.
            FrameError: a weight is malformed; CorruptFrame: its bytes changed on the way.
        """
        if self._first is None:
            run_name(part.name)
            self._first, self.client = part, part.client
        self._bytes += part.ByteSize()
        if self._bytes > self._max_bytes:
            raise MessageError(
                f"adapter {self._first.name!r} has over {self._max_bytes:,} bytes: use a smaller rank"
            )
        for frame in part.weights:
            self._add(frame)
        if not part.last:
            return None
        first = self._first
        weights = {name: torch.cat(rows) if rows[1:] else rows[0] for name, rows in self._weights.items()}
        return AdapterMessage(first.name, first.version, lora_from_proto(first.lora), weights)

    def _add(self, frame: pb.Frame) -> None:
        name = frame.name
        goes_on = name == self._last_name
        if not 0 < len(name) <= MAX_NAME or (name in self._weights and not goes_on):
            raise MessageError(f"a weight called {name[:80]!r}: each has a name of its own")
        if not 1 <= len(frame.shape) <= 2:
            raise FrameError(f"weight {name[:80]} has {len(frame.shape)} dimensions, an adapter's have two")
        if sum(map(len, self._weights.values())) >= MAX_WEIGHTS:
            raise MessageError(f"an adapter of over {MAX_WEIGHTS:,} weights")
        rows = decode_frame(frame, Role.WEIGHT, (None,) * len(frame.shape))
        held = self._weights.setdefault(name, [])
        if held and (rows.shape[1:] != held[0].shape[1:] or rows.dtype != held[0].dtype):
            raise FrameError(f"the rows of weight {name[:80]} do not fit each other")
        held.append(rows)
        self._last_name = name


def adapter_from_parts(parts: Iterable[pb.AdapterPart], max_bytes: int) -> AdapterMessage:
    """Raises MessageError where the stream ends before its last part."""
    assembly = AdapterAssembly(max_bytes)
    for part in parts:
        if (adapter := assembly.add(part)) is not None:
            return adapter
    raise MessageError("an adapter's last part did not come: ask again")
