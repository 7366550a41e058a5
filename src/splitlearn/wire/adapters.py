"""An adapter's weights on the wire: parts of a stream, each a few named frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
    """In parts of about this size; a single weight is never cut."""
    part = pb.AdapterPart(
        name=adapter.name, version=adapter.version, client=client, lora=lora_to_proto(adapter.lora)
    )
    for name, weight in adapter.weights.items():
        frame = encode_frame(weight, Role.WEIGHT, FORMAT)
        frame.name = name
        if part.weights and part.ByteSize() + frame.ByteSize() > part_bytes:
            yield part
            part = pb.AdapterPart()
        part.weights.append(frame)
    part.last = True
    yield part


class AdapterAssembly:
    """Puts the parts together, checked one by one, up to a limit of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._first: pb.AdapterPart | None = None
        self._weights: dict[str, Tensor] = {}
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
        return AdapterMessage(first.name, first.version, lora_from_proto(first.lora), self._weights)

    def _add(self, frame: pb.Frame) -> None:
        name = frame.name
        if not 0 < len(name) <= MAX_NAME or name in self._weights or len(self._weights) >= MAX_WEIGHTS:
            raise MessageError(f"a weight called {name[:80]!r}: each has a name of its own")
        if len(frame.shape) > 2:
            raise FrameError(f"weight {name[:80]} has {len(frame.shape)} dimensions, an adapter's have two")
        self._weights[name] = decode_frame(frame, Role.WEIGHT, (None,) * len(frame.shape))


def adapter_from_parts(parts: Iterable[pb.AdapterPart], max_bytes: int) -> AdapterMessage:
    """Raises MessageError where the stream ends before its last part."""
    assembly = AdapterAssembly(max_bytes)
    for part in parts:
        if (adapter := assembly.add(part)) is not None:
            return adapter
    raise MessageError("an adapter's last part did not come: ask again")
