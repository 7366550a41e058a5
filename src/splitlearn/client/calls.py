"""Calls of one question and one answer, each on a connection of its own: they are rare."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from splitlearn.client.grpc_errors import error_of
from splitlearn.config import ClientConfig
from splitlearn.wire.chunks import STREAM_OPTIONS
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.generated import splitlearn_pb2_grpc as rpc
from splitlearn.wire.handshake import CLIENT_ID_BYTES, facts_from_proto
from splitlearn.wire.messages import RunFacts, TrunkFacts
from splitlearn.wire.runs import facts_from_proto as run_facts_from_proto


def describe(address: str, timeout_s: float) -> TrunkFacts:
    """What the trunk at this address says of itself.

    Raises:
        TrunkUnreachable, NotATrunk: nobody answers there, or somebody else does.
    """
    with calling(address, ClientConfig()) as trunk:
        return facts_from_proto(trunk.Describe(pb.DescribeRequest(), timeout=timeout_s))


def list_runs(address: str, timeout_s: float) -> list[RunFacts]:
    """The runs of the server at this address: those that are open, and those that are only on its disk.

    Raises:
        TrunkUnreachable, NotATrunk: nobody answers there, or somebody else does.
    """
    request = pb.ListRunsRequest(client=secrets.token_bytes(CLIENT_ID_BYTES))
    with calling(address, ClientConfig()) as trunk:
        return [run_facts_from_proto(run) for run in trunk.ListRuns(request, timeout=timeout_s).runs]


def run_facts(address: str, name: str, client: bytes, timeout_s: float) -> RunFacts:
    """Where one run of the server at this address stands, as this client may know it.

    Raises:
        RunLost: there is none of this name; TrunkUnreachable, NotATrunk: as `list_runs`.
    """
    request = pb.RunRequest(name=name, client=client)
    with calling(address, ClientConfig()) as trunk:
        return run_facts_from_proto(trunk.GetRun(request, timeout=timeout_s))


def delete_run(address: str, name: str, timeout_s: float) -> int:
    """Have the server forget a run, its checkpoints too; the bytes that this frees on its disk.

    Raises:
        RunLost: there is none of this name; TrunkUnreachable, NotATrunk: as `list_runs`.
    """
    request = pb.RunRequest(name=name, client=secrets.token_bytes(CLIENT_ID_BYTES))
    with calling(address, ClientConfig()) as trunk:
        return int(trunk.DeleteRun(request, timeout=timeout_s).freed_bytes)


@contextmanager
def calling(address: str, config: ClientConfig) -> Iterator[Any]:
    """The trunk's calls, on a connection of their own; an error of gRPC becomes the server's, or ours."""
    with open_channel(address, config) as channel:
        try:
            yield rpc.TrunkStub(channel)
        except grpc.RpcError as error:
            raise error_of(error, address) from None


def open_channel(address: str, config: ClientConfig) -> grpc.Channel:
    """A connection that is not shared with other channels."""
    return grpc.insecure_channel(
        address,
        options=[
            # The server cuts its messages into pieces of its own choice.
            ("grpc.max_receive_message_length", config.limits.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            *STREAM_OPTIONS,
            # One TCP connection a channel: bulk transfers do not hold up decode steps.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )
