"""What a gRPC failure means to the user: one typed error that says what to do."""

from __future__ import annotations

from typing import Any

import grpc

from splitlearn.errors import NotATrunk, SplitLearnError, TrunkUnreachable
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.status import DETAIL_KEY, error_from_proto

FOREIGN_WORDS = ("http1", "HTTP proxy", "settings frame", "non-200", "http2 error", "Received http")


def error_of(error: Any, address: str) -> SplitLearnError:
    """The error that the server raised, or what the broken call looks like from here."""
    if detail := dict(error.trailing_metadata() or ()).get(DETAIL_KEY):
        return error_from_proto(pb.Error.FromString(detail))
    code, words = error.code(), str(error.details() or "")
    if code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNKNOWN) or any(
        foreign.lower() in words.lower() for foreign in FOREIGN_WORDS
    ):
        return NotATrunk(
            f"something listens on {address}, but it is not a SplitLearn server: check host and port "
            "(`splitlearn serve` prints them)"
        )
    return TrunkUnreachable(
        f"no trunk answers on {address} ({_first_line(words) or code.name}): start it with "
        "`splitlearn serve MODEL`, or check host, port and firewall"
    )


def _first_line(words: str) -> str:
    return words.splitlines()[0][:160] if words else ""
