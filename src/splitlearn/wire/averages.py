"""A member's own ends on the wire, and their average: an adapter's parts, the first with a note."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from splitlearn.errors import MessageError
from splitlearn.vocabulary import LoraSettings, StepKey
from splitlearn.wire.adapters import AdapterAssembly, adapter_to_parts
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.messages import AdapterMessage, AveragedEnds, GivenEnds

UP, DOWN = ".residual_up", ".residual_down"
UNTOLD = LoraSettings(r=0)


def given_to_parts(
    run: str, key: StepKey, client: bytes, given: GivenEnds, part_bytes: int
) -> Iterator[pb.AdapterPart]:
    """`key` names the member, as in its steps."""
    adapter = AdapterMessage(run, given.number, UNTOLD, given.weights)
    head = pb.GivenEnds(
        run=key.run, incarnation=key.incarnation, weight=given.weight, frozen_digest=given.frozen
    )
    for part in adapter_to_parts(adapter, client, part_bytes):
        if part.name:
            part.given.CopyFrom(head)
        yield part


def given_from(adapter: AdapterMessage, head: pb.GivenEnds) -> GivenEnds:
    """What the parts had in them; whether it fits the others', the engine knows."""
    return GivenEnds(adapter.version, head.weight, head.frozen_digest, adapter.weights)


def average_to_parts(run: str, average: AveragedEnds, part_bytes: int) -> Iterator[pb.AdapterPart]:
    named = dict(average.weights)
    for module, (up, down) in average.residual.items():
        named[module + UP], named[module + DOWN] = up, down
    head = pb.AveragedEnds(
        due=average.due,
        members=average.members,
        aggregation_residual=average.aggregation_residual,
        since_start=average.since_start,
    )
    for part in adapter_to_parts(AdapterMessage(run, average.number, UNTOLD, named), b"", part_bytes):
        if part.name:
            part.averaged.CopyFrom(head)
        yield part


def average_from_parts(parts: Iterable[pb.AdapterPart], max_bytes: int) -> AveragedEnds:
    """Raises MessageError where the stream ends before its last part, or half of a residual is missing."""
    assembly, head = AdapterAssembly(max_bytes), pb.AveragedEnds()
    for part in parts:
        if part.HasField("averaged"):
            head = part.averaged
        if (adapter := assembly.add(part)) is not None:
            return _average(adapter, head)
    raise MessageError("an average's last part did not come: ask again")


def _average(adapter: AdapterMessage, head: pb.AveragedEnds) -> AveragedEnds:
    weights = dict(adapter.weights)
    ups = [name for name in weights if name.endswith(UP)]
    try:
        residual = {
            name.removesuffix(UP): (weights.pop(name), weights.pop(name.removesuffix(UP) + DOWN))
            for name in ups
        }
    except KeyError as missing:
        raise MessageError(f"an average without {missing}: ask again") from None
    return AveragedEnds(
        adapter.version,
        head.due,
        head.members,
        head.aggregation_residual,
        weights,
        residual,
        head.since_start,
    )
