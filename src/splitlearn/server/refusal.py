"""An error that ends a call, as gRPC carries it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, TypeVar

import grpc
import structlog

from splitlearn.errors import SplitLearnError, TrunkFailed
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.status import DETAIL_KEY, error_to_proto

Reply = TypeVar("Reply")
log = structlog.get_logger("splitlearn.server")
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


async def refuse(context: Context, error: SplitLearnError) -> None:
    """End the call: the error's class travels in the trailing metadata, its words as the status."""
    detail = error_to_proto(error)
    status = STATUS_OF.get(detail.code, grpc.StatusCode.FAILED_PRECONDITION)
    await context.abort(status, error.message, ((DETAIL_KEY, detail.SerializeToString()),))


def refusing(method: Callable[..., Awaitable[Reply]]) -> Callable[..., Awaitable[Reply]]:
    """A unary call whose errors reach its client as what they are."""

    @wraps(method)
    async def call(self: Any, request: Any, context: Context) -> Reply:
        try:
            return await method(self, request, context)
        except SplitLearnError as error:
            await refuse(context, error)
            raise
        except Exception as error:
            log.error("a call failed", call=method.__name__, exc_info=error)
            await refuse(context, TrunkFailed("the server failed at this call; its log has the cause"))
            raise

    return call
