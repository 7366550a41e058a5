"""What became of a member's gradients as protobuf, both ways."""

from __future__ import annotations

from splitlearn.vocabulary import Fate, Merged
from splitlearn.wire.generated import splitlearn_pb2 as pb

FATES: dict[pb.Fate, Fate] = {getattr(pb, fate.name): fate for fate in Fate}
FATE_IDS = {fate: wire_id for wire_id, fate in FATES.items()}


def merged_to_proto(merged: Merged) -> pb.Merged:
    return pb.Merged(
        fate=FATE_IDS[merged.fate],
        round=merged.round,
        staleness=merged.staleness,
        members=merged.members,
    )


def merged_from_proto(proto: pb.Merged) -> Merged | None:
    """None for a fate that is not known here."""
    fate = FATES.get(proto.fate)
    return None if fate is None else Merged(fate, proto.round, proto.staleness, proto.members)
