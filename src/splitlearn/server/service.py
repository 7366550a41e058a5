"""The gRPC service: decode, submit, encode."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from splitlearn.errors import SplitLearnError
from splitlearn.server.client_stream import ClientStream, Hall, Requests, first_hello
from splitlearn.server.ends_calls import EndsCalls
from splitlearn.server.facts import facts_of
from splitlearn.server.refusal import Context, refuse
from splitlearn.server.run_calls import RunCalls
from splitlearn.server.session_calls import SessionCalls
from splitlearn.wire.chunks import deserialize_client, serialize
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.generated import splitlearn_pb2_grpc as rpc
from splitlearn.wire.handshake import facts_to_proto

SERVICE = pb.DESCRIPTOR.services_by_name["Trunk"].full_name


class TrunkService(EndsCalls, RunCalls, SessionCalls, rpc.TrunkServicer):
    """What a client can call."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeReply:
        hall = self._hall
        facts = facts_of(hall.engine, hall.identity, draining=hall.admission.is_draining)
        return facts_to_proto(facts, hall.config.limits, hall.config.sessions.answer_window)

    async def Steps(self, requests: Requests, context: Context) -> AsyncIterator[pb.ServerMessage | bytes]:
        try:
            with self._hall.admission.stream():
                hello = await first_hello(requests)
                stream = self._hall.lane(hello) if hello.lane_of else ClientStream(self._hall, hello)
                async for message in stream.messages(requests):
                    yield message
        except SplitLearnError as error:
            await refuse(context, error)


def add_to_server(service: TrunkService, server: grpc.aio.Server) -> None:
    """As the generated code does it, but large tensors pass the stream without protobuf."""
    generated = _Handlers()
    rpc.add_TrunkServicer_to_server(service, generated)
    steps = grpc.stream_stream_rpc_method_handler(
        service.Steps, request_deserializer=deserialize_client, response_serializer=serialize
    )
    handlers = generated.found | {"Steps": steps}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class _Handlers:
    """Stands for a server, to learn what the generated code would add to it."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The same in another form."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.found |= handlers
