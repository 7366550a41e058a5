"""A trunk server in this process: loads the trunk, listens, drains, stops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import structlog
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from splitlearn.config import ServerConfig
from splitlearn.engine.checkpoint import RunStore
from splitlearn.engine.disk_budget import DiskBudget
from splitlearn.engine.engine import Engine
from splitlearn.engine.round_keeper import RoundKeeper
from splitlearn.errors import SettingError, TrunkDraining, first_line
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment
from splitlearn.model.weights import fingerprint, load_trunk
from splitlearn.server.admission import Admission
from splitlearn.server.client_stream import Hall
from splitlearn.server.egress import Egress
from splitlearn.server.handover import Handover
from splitlearn.server.service import SERVICE, TrunkService, add_to_server
from splitlearn.wire.chunks import STREAM_OPTIONS
from splitlearn.wire.handshake import ModelIdentity

log = structlog.get_logger("splitlearn.server")
START_S = 60.0
GRACE_S = 1.0
ENVELOPE_BYTES = 1 << 16
QUIET_S = 1.0
POLL_S = 0.05


class TrunkServer:
    """Holds the trunk of a model and serves it; a context manager.

    Args:
        model: folder or hub id of the whole model, or a folder that `splitlearn slice` wrote.
        settings: the fields of `splitlearn.config.ServerConfig`, by name.

    Raises:
        SettingError, SplitPlanError, UnsupportedModel, CheckpointError: before anything listens.
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        self.config = ServerConfig(model=str(model), **settings)
        self._engine: Engine | None = None
        self._port: Future[int] = Future()
        self._ask_to_stop: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._serve, name="trunk server", daemon=True)

    @property
    def address(self) -> str:
        """`host:port` as a client needs it."""
        return _joined(self.config.host, self._port.result(START_S))

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "the server has not been started"
        return self._engine

    def start(self) -> Self:
        """Load the trunk, then listen; returns once clients can connect."""
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        trunk, self._identity = load(self.config)
        config = self.config
        self._engine = Engine(
            trunk,
            config.batching,
            config.sessions,
            config.runs,
            compile=config.compile,
            quotas=config.quotas,
        )
        self._engine.on_failure = lambda: self._ask_to_stop()
        self._engine.start()
        self._thread.start()
        self._port.result(START_S)
        return self

    def stop(self) -> None:
        """Refuse new sessions, let the open ones finish for up to `drain_s`, then end."""
        self._ask_to_stop()
        self.wait()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until the server has ended; False where the time ran out before."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # The server's thread.

    def _serve(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            if self._port.done():
                raise
            self._port.set_exception(error)
        finally:
            self.engine.stop()

    async def _run(self) -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        self._ask_to_stop = lambda: loop.is_closed() or loop.call_soon_threadsafe(stop.set)
        admission, egress = Admission(self.config.max_streams), Egress()
        egress.start()
        budget = DiskBudget(self.config.state_dir, self.config.runs.disk_budget_bytes)
        runs = RunStore(self.config.state_dir / f"{self._identity.weights_hash:016x}" / "runs", budget)
        with contextlib.suppress(OSError):  # who saves is told of a folder that cannot be used
            runs.clear_up()
        keeper = RoundKeeper(runs, self.engine.runs)
        self.engine.runs.keep_rounds(keeper.changed)
        keeper.start()
        handover = Handover(loop)
        self.engine.in_one_go = handover.in_one_go
        self._hall = hall = Hall(self.engine, self._identity, self.config, admission, egress, handover, runs)
        server, healthy = self._grpc_server(hall)
        await server.start()
        await healthy.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
        self._port.set_result(self._bound_port)
        await stop.wait()
        admission.drain()
        self.engine.drain()
        await healthy.enter_graceful_shutdown()
        await self._until_quiet(hall)
        for stream in tuple(hall.streams):
            stream.end(TrunkDraining(f"the server on {self.address} has stopped: start it again"))
        await server.stop(grace=GRACE_S)
        egress.stop()
        await asyncio.to_thread(keeper.stop)

    def _grpc_server(self, hall: Hall) -> tuple[grpc.aio.Server, Any]:
        """Raises SettingError where the address cannot be listened on."""
        server = grpc.aio.server(options=_options(self.config))
        add_to_server(TrunkService(hall), server)
        healthy = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        address = _joined(self.config.host, self.config.port)
        try:
            self._bound_port = server.add_insecure_port(address)
        except RuntimeError:
            raise SettingError(
                f"cannot listen on {address}: is the port taken? Choose another with --port (0: a free one)"
            ) from None
        return server, healthy

    async def _until_quiet(self, hall: Hall) -> None:
        """Until all answers are out and no text is being written any more, or `drain_s` is over."""
        until = time.monotonic() + self.config.drain_s
        while not _is_quiet(hall) and time.monotonic() < until:
            await asyncio.sleep(POLL_S)


def _is_quiet(hall: Hall) -> bool:
    """No answer is owed, no session leaves; and none is open, or none has been answered for a second."""
    if hall.moving or any(stream.owed for stream in hall.streams):
        return False
    idle_since = time.monotonic() - QUIET_S
    return not hall.engine.open_sessions or all(stream.last_answer_at < idle_since for stream in hall.streams)


def _joined(host: str, port: int) -> str:
    """An IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def load(config: ServerConfig) -> tuple[TrunkSegment, ModelIdentity]:
    """The trunk that these settings name, and what tells it from others."""
    checkpoint = Checkpoint.open(config.model)
    plan = SplitPlan.for_config(
        checkpoint.config, config.bottom_layers, config.top_layers, config.accept_label_leak
    )
    trunk = load_trunk(
        checkpoint,
        plan,
        dtype=config.dtype,
        device=resolve_device(config.device),
        attention=config.attention,
    )
    print_of = fingerprint(checkpoint, plan)
    sizes = (len(plan.bottom), len(plan.trunk), len(plan.top))
    return trunk, ModelIdentity.of(print_of.config_hash, print_of.weights_hash, *sizes)


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one.

    Raises:
        SettingError: the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"device {name!r} cannot be used: {first_line(error)}") from None
    return torch.device(name)


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    piece = config.limits.chunk_bytes + ENVELOPE_BYTES
    return [
        *STREAM_OPTIONS,
        ("grpc.max_receive_message_length", piece),
        ("grpc.max_send_message_length", piece),
        ("grpc.so_reuseport", 0),
        # A client that is gone without a word frees its place.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
