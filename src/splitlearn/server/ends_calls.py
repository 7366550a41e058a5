"""Calls by which a cohort's members average their own ends: give, and take what became of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from splitlearn.engine.ends import Ends
from splitlearn.engine.ends_average import EndsAverage
from splitlearn.engine.run import Run
from splitlearn.errors import MessageError, RoundUnfinished, SplitLearnError
from splitlearn.server.client_stream import Hall
from splitlearn.server.refusal import Context, refuse, refusing
from splitlearn.vocabulary import StepKey
from splitlearn.wire.adapters import AdapterAssembly
from splitlearn.wire.averages import average_to_parts, given_from
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.generated import splitlearn_pb2_grpc as rpc
from splitlearn.wire.handshake import client_id

GIVE_S = 600.0
POLL_S = 0.05
ASKS_A_LEASE = 3
"""Who waits renews its lease, by asking again, before a third of it is over."""


class EndsCalls(rpc.TrunkServicer):
    """Arithmetic and disk are no matter of the engine's thread, which is asked who is there."""

    _hall: Hall

    @refusing
    async def GiveEnds(self, requests: AsyncIterator[pb.AdapterPart], context: Context) -> pb.AdapterReply:
        try:
            async with asyncio.timeout(GIVE_S):
                return await self._given(requests)
        except TimeoutError:
            raise MessageError(f"the parts of the ends did not come within {GIVE_S:g} s: again") from None

    async def TakeAverage(
        self, request: pb.AverageRequest, context: Context
    ) -> AsyncIterator[pb.AdapterPart]:
        """Once it is made; an error says who is waited for where that takes long."""
        try:
            run, member = await self._member(request.client, request.run, request.incarnation)
            average = await self._made(run, member, request.number)
            told = average.since(request.since)
            parts = average_to_parts(run.name, told, self._hall.config.limits.chunk_bytes)
            while (part := await asyncio.to_thread(next, parts, None)) is not None:
                yield part
        except SplitLearnError as error:
            await refuse(context, error)

    async def _given(self, requests: AsyncIterator[pb.AdapterPart]) -> pb.AdapterReply:
        assembly = AdapterAssembly(self._hall.config.runs.max_adapter_bytes)
        head, whose = pb.GivenEnds(), None
        async for part in requests:
            if whose is None:
                # Before the bytes of somebody come that has no part in it.
                head.CopyFrom(part.given)
                whose = await self._member(part.client, head.run, head.incarnation)
            if (adapter := await asyncio.to_thread(assembly.add, part)) is not None:
                run, member = whose
                if adapter.name != run.name:
                    raise MessageError(f"ends for run {adapter.name} from a member of {run.name}")
                given, ends = given_from(adapter, head), run.of_ends()
                await asyncio.to_thread(ends.give, member, given)
                return pb.AdapterReply(name=run.name, version=ends.number, bytes=given.nbytes)
        raise MessageError("the last part of the ends did not come: send them again")

    async def _member(self, client: bytes, number: int, incarnation: int) -> tuple[Run, str]:
        """The run that this member averages in, its lease renewed; what is kept of its averages is read."""
        key = StepKey(run=number, incarnation=incarnation)
        found = self._hall.engine.runs.ends(client_id(client), key)
        run, member = await asyncio.wrap_future(found)
        await asyncio.to_thread(run.of_ends().wake, *self._hall.runs.folder(run.name))
        return run, member.name

    async def _made(self, run: Run, member: str, number: int) -> EndsAverage:
        """Raises RoundUnfinished where others are waited for, and the member has to say that it is there."""
        ends: Ends = run.of_ends()
        until = time.monotonic() + self._hall.config.runs.member_lease_s / ASKS_A_LEASE
        while (average := ends.find(member, number)) is None:
            awaited = await asyncio.wrap_future(self._hall.engine.runs.awaited(run))
            if await asyncio.to_thread(ends.close_if, awaited):
                continue
            if time.monotonic() > until:
                raise RoundUnfinished(ends.missing(awaited))
            await asyncio.sleep(POLL_S)
        return average
