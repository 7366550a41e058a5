"""What a gRPC failure means to the user: one typed error that says what to do."""

from __future__ import annotations

from typing import Any

import grpc

from splitlearn.errors import NotATrunk, SplitLearnError, TrunkUnreachable
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.status import DETAIL_KEY, error_from_proto

FOREIGN_WORDS = ("http1", "HTTP proxy", "settings frame", "non-200", "http2 error", "Received http")


def error_of(error: Any, address: str, *, connected: bool = False) -> SplitLearnError:
    """The error that the server raised, or what the broken call looks like from here.

    `connected` says that a trunk has answered on this connection before.
    """
    if detail := dict(error.trailing_metadata() or ()).get(DETAIL_KEY):
        return error_from_proto(pb.Error.FromString(detail))
    code, words = error.code(), str(error.details() or "")
    foreign = any(each.lower() in words.lower() for each in FOREIGN_WORDS)
    if not connected and (foreign or code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNKNOWN)):
        return NotATrunk(
            f"something listens on {address}, but it is not a SplitLearn server: check host and port "
            "(`splitlearn serve` prints them)"
        )
    if connected:
        return TrunkUnreachable(
            f"the connection to {address} broke ({_first_line(words) or code.name}): is the server still "
            "running? Start it again"
        )
    return TrunkUnreachable(
        f"no trunk answers on {address} ({_first_line(words) or code.name}): start it with "
        "`splitlearn serve MODEL`, or check host, port and firewall"
    )


def _first_line(words: str) -> str:
    return words.splitlines()[0][:160] if words else ""
