"""`splitlearn serve`: hold the trunk of a model until a signal says to stop."""

from __future__ import annotations

import ipaddress
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from splitlearn.cli.options import (
    BOTTOM_LAYERS,
    TOP_LAYERS,
    AcceptLabelLeak,
    BottomLayers,
    Model,
    TopLayers,
    default_of,
    setting,
)
from splitlearn.cli.sizes import parse_bytes
from splitlearn.config import (
    GIB,
    AttentionName,
    BatchingConfig,
    DTypeName,
    QuotaConfig,
    RunConfig,
    ServerConfig,
    SessionConfig,
)
from splitlearn.errors import TrunkFailed

if TYPE_CHECKING:
    from splitlearn.server.trunk_server import TrunkServer

POLL_S = 0.5


def serve(
    model: Model,
    bottom_layers: BottomLayers = BOTTOM_LAYERS,
    top_layers: TopLayers = TOP_LAYERS,
    accept_label_leak: AcceptLabelLeak = False,
    host: Annotated[str, setting(ServerConfig, "host")] = default_of(ServerConfig, "host"),
    port: Annotated[int, setting(ServerConfig, "port", min=0, max=65535)] = default_of(ServerConfig, "port"),
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen beyond this machine without TLS, which is not there yet."),
    ] = False,
    device: Annotated[str, setting(ServerConfig, "device")] = default_of(ServerConfig, "device"),
    dtype: Annotated[DTypeName, setting(ServerConfig, "dtype")] = "auto",
    attention: Annotated[AttentionName, setting(ServerConfig, "attention")] = "auto",
    threads: Annotated[int, setting(ServerConfig, "threads", min=0)] = default_of(ServerConfig, "threads"),
    kv_budget: Annotated[
        int, setting(SessionConfig, "kv_budget_bytes", "--kv-budget", parser=parse_bytes, metavar="BYTES")
    ] = f"{default_of(SessionConfig, 'kv_budget_bytes') // GIB}GiB",  # type: ignore[assignment]
    session_tokens: Annotated[int, setting(SessionConfig, "session_tokens", min=1)] = default_of(
        SessionConfig, "session_tokens"
    ),
    max_batch_rows: Annotated[int, setting(BatchingConfig, "max_batch_rows", min=1)] = default_of(
        BatchingConfig, "max_batch_rows"
    ),
    wait_ms: Annotated[
        float | None, setting(BatchingConfig, "wait_ms", min=0, show_default="as long as it pays")
    ] = None,
    lease: Annotated[float, setting(SessionConfig, "lease_s", "--lease", metavar="SECONDS")] = default_of(
        SessionConfig, "lease_s"
    ),
    prefill_chunk: Annotated[
        int | None,
        setting(
            BatchingConfig,
            "prefill_chunk_tokens",
            "--prefill-chunk",
            min=1,
            metavar="TOKENS",
            show_default="512, on a GPU 1024",
        ),
    ] = None,
    decode_share: Annotated[float, setting(BatchingConfig, "decode_share")] = default_of(
        BatchingConfig, "decode_share"
    ),
    training_share: Annotated[float, setting(BatchingConfig, "training_share")] = default_of(
        BatchingConfig, "training_share"
    ),
    state_dir: Annotated[
        Path | None,
        setting(ServerConfig, "state_dir", metavar="DIR", show_default="~/.local/state/splitlearn"),
    ] = None,
    tape_budget: Annotated[
        int, setting(RunConfig, "tape_budget_bytes", "--tape-budget", parser=parse_bytes, metavar="BYTES")
    ] = f"{default_of(RunConfig, 'tape_budget_bytes') // GIB}GiB",  # type: ignore[assignment]
    member_lease: Annotated[
        float, setting(RunConfig, "member_lease_s", "--member-lease", metavar="SECONDS")
    ] = default_of(RunConfig, "member_lease_s"),
    disk_budget: Annotated[
        int, setting(RunConfig, "disk_budget_bytes", "--disk-budget", parser=parse_bytes, metavar="BYTES")
    ] = f"{default_of(RunConfig, 'disk_budget_bytes') // GIB}GiB",  # type: ignore[assignment]
    quota_sessions: Annotated[
        int | None,
        setting(QuotaConfig, "max_sessions", "--quota-sessions", min=1, show_default="no limit"),
    ] = None,
    quota_bytes: Annotated[
        int | None,
        setting(
            QuotaConfig,
            "max_bytes",
            "--quota-bytes",
            parser=parse_bytes,
            metavar="BYTES",
            show_default="no limit",
        ),
    ] = None,
    quota_tokens: Annotated[
        float | None,
        setting(
            QuotaConfig,
            "max_tokens_per_s",
            "--quota-tokens",
            min=0,
            metavar="TOKENS/S",
            show_default="no limit",
        ),
    ] = None,
    quota_burst: Annotated[
        int | None,
        setting(
            QuotaConfig,
            "burst_tokens",
            "--quota-burst",
            min=1,
            metavar="TOKENS",
            show_default="those of a second",
        ),
    ] = None,
    quota_turns: Annotated[
        float | None,
        setting(QuotaConfig, "turn_share", "--quota-turns", metavar="SHARE", show_default="no limit"),
    ] = None,
    compile: Annotated[
        Literal["auto", "off", "default", "max"], setting(ServerConfig, "compile")
    ] = default_of(ServerConfig, "compile"),
    drain: Annotated[float, setting(ServerConfig, "drain_s", "--drain", metavar="SECONDS")] = default_of(
        ServerConfig, "drain_s"
    ),
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Write the log as one JSON object a line.")
    ] = False,
) -> None:
    """Hold the trunk of a model; prints `listening on HOST:PORT` when ready.

    SIGTERM or Ctrl-C drains: running steps finish, new sessions are refused.
    """
    require_loopback(host, insecure)

    from splitlearn.monitor.logs import log_to_stderr
    from splitlearn.server.trunk_server import TrunkServer

    log_to_stderr(as_json=log_json)
    server = TrunkServer(
        model,
        bottom_layers=bottom_layers,
        top_layers=top_layers,
        accept_label_leak=accept_label_leak,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        attention=attention,
        threads=threads,
        drain_s=drain,
        compile=compile,
        batching={
            "max_batch_rows": max_batch_rows,
            "wait_ms": wait_ms,
            "prefill_chunk_tokens": prefill_chunk,
            "decode_share": decode_share,
            "training_share": training_share,
        },
        runs={
            "tape_budget_bytes": tape_budget,
            "disk_budget_bytes": disk_budget,
            "member_lease_s": member_lease,
        },
        quotas={
            "max_sessions": quota_sessions,
            "max_bytes": quota_bytes,
            "max_tokens_per_s": quota_tokens,
            "burst_tokens": quota_burst,
            "turn_share": quota_turns,
        },
        **({} if state_dir is None else {"state_dir": state_dir}),
        sessions={"kv_budget_bytes": kv_budget, "session_tokens": session_tokens, "lease_s": lease},
    )
    serve_until_asked_to_stop(server)


def require_loopback(host: str, insecure: bool) -> None:
    """Raises BadParameter where the wire would be open to others and nobody has said that it may be."""
    if not insecure and not is_loopback(host):
        raise typer.BadParameter(
            f"--host {host} is reachable from other machines, and there is no TLS yet: "
            "anyone on the way could read the activations. Use 127.0.0.1, or write --insecure to accept that"
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def serve_until_asked_to_stop(server: TrunkServer) -> None:
    import structlog

    log = structlog.get_logger("splitlearn.serve")
    log.info("loading", model=server.config.model)
    server.start()
    stop = stop_signal()
    log.info("serving", **facts(server))
    print(f"listening on {server.address}", flush=True)
    while not stop.wait(POLL_S):
        if server.wait(0):
            raise TrunkFailed("the server ended by itself: its log above has the cause")
    log.info("draining", open_sessions=server.engine.open_sessions, at_most_s=server.config.drain_s)
    server.stop()
    log.info("stopped")


def stop_signal() -> threading.Event:
    """Set by the first SIGTERM or Ctrl-C; a second Ctrl-C ends the process at once."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    return asked


def facts(server: TrunkServer) -> dict[str, Any]:
    """What an operator wants to see of a server that has just started."""
    engine = server.engine
    trunk = engine.trunk
    return {
        "split": str(trunk.plan),
        "model_type": trunk.config.model_type,
        "device": str(trunk.device),
        "dtype": str(trunk.dtype).removeprefix("torch."),
        "attention": trunk.attention,
        "attention_because": trunk.attention_reason,
        "batched": trunk.batched,
        "kv_bytes": engine.kv.total_bytes,
        "sessions_that_fit": engine.kv.slots,
        "session_tokens": engine.kv.slot_tokens,
    }
