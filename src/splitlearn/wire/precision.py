"""A precision as protobuf, both ways."""

from __future__ import annotations

from splitlearn.errors import MessageError
from splitlearn.vocabulary import Precision
from splitlearn.wire.dtypes import dtype_name, dtype_named
from splitlearn.wire.frames import DTYPE_IDS, DTYPES
from splitlearn.wire.generated import splitlearn_pb2 as pb


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


def _dtype_id(name: str) -> pb.DType:
    return DTYPE_IDS[dtype_named(name)] if name else pb.DTYPE_UNSPECIFIED


def _name_of(wire_id: pb.DType) -> str:
    if wire_id == pb.DTYPE_UNSPECIFIED:
        return ""
    if wire_id not in DTYPES:
        raise MessageError(f"dtype {wire_id} is not in the protocol")
    return dtype_name(DTYPES[wire_id])
