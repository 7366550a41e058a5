"""The gRPC service: decode, submit, encode."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from splitlearn.errors import NotServed, SplitLearnError
from splitlearn.server.client_stream import ClientStream, Hall
from splitlearn.server.facts import facts_of
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.generated import splitlearn_pb2_grpc as rpc
from splitlearn.wire.handshake import facts_to_proto
from splitlearn.wire.status import DETAIL_KEY, error_to_proto

Context = Any
"""`grpc.aio.ServicerContext`, whose type parameters nobody agrees on."""

STATUS_OF: dict[int, grpc.StatusCode] = {
    pb.TRUNK_DRAINING: grpc.StatusCode.UNAVAILABLE,
    pb.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    pb.KV_BUDGET_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    pb.ACCESS_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    pb.FRAME: grpc.StatusCode.INVALID_ARGUMENT,
    pb.MESSAGE: grpc.StatusCode.INVALID_ARGUMENT,
    pb.NOT_SERVED: grpc.StatusCode.UNIMPLEMENTED,
    pb.TRUNK_FAILED: grpc.StatusCode.INTERNAL,
}


class TrunkService(rpc.TrunkServicer):
    """What a client can call; the calls that belong to training are answered with NotServed."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeReply:
        hall = self._hall
        facts = facts_of(hall.engine, hall.identity, draining=hall.admission.is_draining)
        return facts_to_proto(facts, hall.config.limits, hall.config.sessions.answer_window)

    async def Steps(
        self, requests: AsyncIterator[pb.ClientMessage], context: Context
    ) -> AsyncIterator[pb.ServerMessage]:
        try:
            with self._hall.admission.stream():
                async for message in ClientStream(self._hall).messages(requests):
                    yield message
        except SplitLearnError as error:
            await refuse(context, error)


async def refuse(context: Context, error: SplitLearnError) -> None:
    """End the call: the error's class travels in the trailing metadata, its words as the status."""
    detail = error_to_proto(error)
    status = STATUS_OF.get(detail.code, grpc.StatusCode.FAILED_PRECONDITION)
    await context.abort(status, error.message, ((DETAIL_KEY, detail.SerializeToString()),))


def _not_served(name: str) -> Any:
    async def method(self: TrunkService, request: Any, context: Context) -> None:
        await refuse(
            context, NotServed(f"{name} belongs to training or moving, which this version does not serve")
        )

    method.__name__ = name
    return method


for _method in pb.DESCRIPTOR.services_by_name["Trunk"].methods:
    if _method.name not in vars(TrunkService):
        setattr(TrunkService, _method.name, _not_served(_method.name))
