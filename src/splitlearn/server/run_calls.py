"""Calls about runs: open, join, list, save, restore, close, delete; their steps come on the stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import replace

from splitlearn.engine.checkpoint import RunStore
from splitlearn.engine.run import Run
from splitlearn.errors import (
    MessageError,
    ResourceExhausted,
    RunLost,
    SplitLearnError,
    StepOutOfOrder,
)
from splitlearn.server.client_stream import Hall
from splitlearn.server.refusal import Context, refuse, refusing
from splitlearn.vocabulary import StepKey
from splitlearn.wire.adapters import AdapterAssembly, adapter_to_parts
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.generated import splitlearn_pb2_grpc as rpc
from splitlearn.wire.handshake import client_id
from splitlearn.wire.messages import SAVED, AdapterMessage, RunFacts
from splitlearn.wire.runs import facts_to_proto, member_name, open_run_from_proto, run_name

ADAPTER_S = 600.0


class RunCalls(rpc.TrunkServicer):
    """What touches a run is done on the engine's thread; what touches the disk, where nobody else waits."""

    _hall: Hall

    @refusing
    async def OpenRun(self, request: pb.OpenRunRequest, context: Context) -> pb.RunReply:
        asked = open_run_from_proto(request)
        kept = await asyncio.to_thread(self._store.steps, asked.name)
        if kept and not asked.settings.cohort.is_private:
            return await self._joined(client_id(request.client), asked.name, asked.member)
        if kept:
            raise MessageError(
                f"run {asked.name!r} has checkpoints on this server (steps {list(kept)}): resume from one, "
                "take another name, or delete them"
            )
        return await self._reply(self._hall.engine.runs.open(client_id(request.client), asked))

    @refusing
    async def JoinRun(self, request: pb.JoinRunRequest, context: Context) -> pb.RunReply:
        """As a new incarnation; or, with the one that it has, a member of a cohort renews its lease."""
        client, name = client_id(request.client), run_name(request.name)
        if request.incarnation:
            return await self._reply(self._hall.engine.runs.renew(client, name, request.incarnation))
        return await self._joined(client, name, member_name(request.member))

    @refusing
    async def LeaveRun(self, request: pb.RunRequest, context: Context) -> pb.RunReply:
        return await self._reply(
            self._hall.engine.runs.leave(client_id(request.client), run_name(request.name))
        )

    @refusing
    async def GetRun(self, request: pb.RunRequest, context: Context) -> pb.RunReply:
        """Where the run stands; one that is only on disk is answered too."""
        name, client = run_name(request.name), client_id(request.client)
        try:
            return await self._reply(self._hall.engine.runs.facts_for(client, name))
        except RunLost:
            if not (kept := await asyncio.to_thread(self._store.steps, name)):
                raise
            saved = RunFacts(name, state=SAVED, step=kept[-1])
            return facts_to_proto(await asyncio.to_thread(self._with_disk, saved))

    @refusing
    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsReply:
        is_open = await asyncio.wrap_future(self._hall.engine.runs.facts())
        every = await asyncio.to_thread(self._with_saved, is_open)
        return pb.ListRunsReply(runs=map(facts_to_proto, every))

    @refusing
    async def SaveRun(self, request: pb.SaveRunRequest, context: Context) -> pb.RunReply:
        """The run as it stands after the step that its client has just had done."""
        name, engine = run_name(request.name), self._hall.engine
        key = StepKey(run=request.run, incarnation=request.incarnation)
        snapshot = await asyncio.wrap_future(engine.runs.snapshot(client_id(request.client), key))
        if snapshot.name != name:
            raise MessageError(f"what is to be saved as run {name} is run {snapshot.name}: say its own name")
        if request.step != snapshot.step:
            raise StepOutOfOrder(
                f"run {name} stands at step {snapshot.step}, not {request.step}: nothing was saved",
                facts={"current_step": snapshot.step},
            )
        kept = frozenset(request.kept_steps)
        await asyncio.to_thread(self._store.forget_before, name, request.acknowledged_step, kept)
        await asyncio.to_thread(self._require_place, name)
        await asyncio.to_thread(self._store.write, snapshot)
        return await self._reply(engine.runs.do(name, Run.facts))

    @refusing
    async def RestoreRun(self, request: pb.RestoreRunRequest, context: Context) -> pb.RunReply:
        name = run_name(request.name)
        snapshot = await asyncio.to_thread(self._store.read, name, request.step, request.digest)
        return await self._reply(self._hall.engine.runs.restore(client_id(request.client), snapshot))

    @refusing
    async def CloseRun(self, request: pb.RunRequest, context: Context) -> pb.RunReply:
        return await self._reply(self._hall.engine.runs.close(run_name(request.name)))

    @refusing
    async def DeleteRun(self, request: pb.RunRequest, context: Context) -> pb.DeleteReply:
        """From memory and from disk."""
        name = run_name(request.name)
        try:
            await asyncio.wrap_future(self._hall.engine.runs.close(name))
        except RunLost:
            if not await asyncio.to_thread(self._store.has, name):
                raise
        return pb.DeleteReply(freed_bytes=await asyncio.to_thread(self._store.delete, name))

    @refusing
    async def LoadAdapter(self, requests: AsyncIterator[pb.AdapterPart], context: Context) -> pb.AdapterReply:
        try:
            async with asyncio.timeout(ADAPTER_S):
                client, adapter = await self._received(requests)
        except TimeoutError:
            raise MessageError(f"an adapter's parts did not come within {ADAPTER_S:g} s: again") from None
        version = await asyncio.wrap_future(self._hall.engine.runs.load_adapter(client, adapter))
        size = sum(weight.nbytes for weight in version.weights.values())
        return pb.AdapterReply(name=version.name, version=version.number, bytes=size)

    async def _received(self, requests: AsyncIterator[pb.AdapterPart]) -> tuple[bytes, AdapterMessage]:
        """The adapter, and whose it is."""
        assembly = AdapterAssembly(self._hall.config.runs.max_adapter_bytes)
        async for part in requests:
            if (adapter := await asyncio.to_thread(assembly.add, part)) is not None:
                return client_id(assembly.client), adapter
        raise MessageError("an adapter's last part did not come: send it again")

    @refusing
    async def UnloadAdapter(self, request: pb.AdapterRequest, context: Context) -> pb.DeleteReply:
        client, name = client_id(request.client), run_name(request.name)
        unloaded = self._hall.engine.runs.unload_adapter(client, name)
        freed_bytes: int = await asyncio.wrap_future(unloaded)
        return pb.DeleteReply(freed_bytes=freed_bytes)

    async def DownloadAdapter(
        self, request: pb.AdapterRequest, context: Context
    ) -> AsyncIterator[pb.AdapterPart]:
        """The trunk's part of a run's adapter, if the run allows it."""
        try:
            client, name = client_id(request.client), run_name(request.name)
            found = self._hall.engine.runs.adapter(client, name)
            adapter = await asyncio.wrap_future(found)
            parts = adapter_to_parts(adapter, request.client, self._hall.config.limits.chunk_bytes)
            while (part := await asyncio.to_thread(next, parts, None)) is not None:
                yield part
        except SplitLearnError as error:
            await refuse(context, error)

    @property
    def _store(self) -> RunStore:
        return self._hall.runs

    async def _joined(self, client: bytes, name: str, member: str) -> pb.RunReply:
        """A run that is open, or a cohort's that is brought back from the disk.

        Raises:
            RunLost: it is neither; a private run is restored on its client's word alone.
        """
        try:
            return await self._reply(self._hall.engine.runs.join(client, name, member))
        except RunLost:
            if not (kept := await asyncio.to_thread(self._store.steps, name)):
                raise
        snapshot = await asyncio.to_thread(self._store.read, name, kept[-1])
        if snapshot.cohort is None:
            raise RunLost(f"run {name} is on the disk alone: resume from its newest checkpoint")
        return await self._reply(self._hall.engine.runs.revive(client, snapshot, member))

    async def _reply(self, done: Future[RunFacts]) -> pb.RunReply:
        facts = await asyncio.wrap_future(done)
        return facts_to_proto(await asyncio.to_thread(self._with_disk, facts))

    def _with_saved(self, is_open: list[RunFacts]) -> list[RunFacts]:
        """The runs that are open and those that are on disk alone."""
        names = {facts.name for facts in is_open}
        steps = {name: self._store.steps(name) for name in self._store.names() if name not in names}
        saved = [RunFacts(name, state=SAVED, step=max(kept, default=0)) for name, kept in steps.items()]
        return [self._with_disk(each) for each in (*is_open, *saved)]

    def _with_disk(self, facts: RunFacts) -> RunFacts:
        store = self._store
        kept = store.digests(facts.name)
        return replace(
            facts,
            checkpoints=tuple(kept),
            digests=tuple(kept.values()),
            bytes_on_disk=store.bytes(facts.name),
        )

    def _require_place(self, name: str) -> None:
        limit = self._hall.config.runs.max_checkpoints
        if len(self._store.steps(name)) >= limit:
            raise ResourceExhausted(
                f"run {name} has {limit} checkpoints, the most that this server keeps of one: save fewer, or "
                "let older ones go (save_total_limit)",
                facts={"checkpoints": limit},
            )
