"""Every setting, with its unit in its name and its explanation below it; unknown keys are refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from splitlearn.errors import SettingError

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
CodecName = Literal["raw", "half"]
AttentionName = Literal["auto", "flash", "sdpa", "eager"]
Share = Annotated[float, Field(gt=0, lt=1)]
MIB = 1 << 20
GIB = 1 << 30


def _state_dir() -> Path:
    """The user's, by the XDG convention."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "splitlearn"


CompileMode = Literal["auto", "off", "default", "max"]


class Settings(BaseModel):
    """Settings are values: checked once, then never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def __init__(self, **fields: Any) -> None:
        """Raises SettingError, in one line, for an unknown key or a value out of range."""
        if _within.get():
            # Whoever checks the whole says where in it this stands.
            super().__init__(**fields)
            return
        try:
            with all_faults():
                super().__init__(**fields)
        except ValidationError as error:
            raise SettingError(_one_line(error)) from None


_within: ContextVar[bool] = ContextVar("within", default=False)


@contextmanager
def all_faults() -> Iterator[None]:
    """Settings that are made within raise pydantic's ValidationError, which says where each fault stands."""
    token = _within.set(True)
    try:
        yield
    finally:
        _within.reset(token)


def _one_line(error: ValidationError) -> str:
    faults = [
        f"{'.'.join(map(str, fault['loc']))} = {fault['input']!r}: {fault['msg'].lower()}"
        for fault in error.errors()
    ]
    return "; ".join(faults)


class BatchingConfig(Settings):
    """Which waiting steps the trunk runs together."""

    max_batch_tokens: PositiveInt = 4096
    """Tokens up to which steps are joined into one batch: more is faster and takes more memory."""
    max_batch_rows: PositiveInt = 64
    """Rows (sequences) up to which steps are joined into one batch."""
    prefill_chunk_tokens: PositiveInt | None = None
    """New tokens a row that run at once, by default 512, on a GPU 1024, of many rows no more than a batch
    takes: a longer prompt runs in pieces, and others' steps between them; fewer delay the others less, more
    make the prompt itself faster."""
    decode_share: Share = 0.5
    """Part of the turns that decode steps get while prompts or training steps wait too; a turn is one batch
    of decode steps, one batch of pieces of prompts, or one training step."""
    training_share: Share = 0.5
    """Part of the other turns that training steps get while prompts wait too."""
    wait_ms: NonNegativeFloat | None = None
    """How long after its answer a session's next decode step is waited for, so that it joins those that wait
    already; left out, as long as a joint batch saves more than the wait costs; 0 waits for nobody."""
    adapter_bank_bytes: NonNegativeInt = 4 * GIB
    """Memory for copies of the adapters that sessions generate with, so that their steps run together;
    adapters without room there run in batches of their own. Taken when the first such batch comes."""

    def chunk_tokens(self, device: str) -> int:
        """The pieces of prompts on a device of this type: on a GPU any up to 1024 take as long."""
        return self.prefill_chunk_tokens or (1024 if device == "cuda" else 512)


class SessionConfig(Settings):
    """What one client's generation may hold on the trunk, and for how long."""

    kv_budget_bytes: PositiveInt = 4 * GIB
    """Memory for the keys and values of all sessions; a session that does not fit is refused."""
    session_tokens: PositiveInt = 4096
    """Longest text of one row of a session; the model's own positions are a limit too."""
    lease_s: PositiveFloat = 600.0
    """A session that is idle for longer is closed and its memory freed."""
    orphan_lease_s: PositiveFloat = 60.0
    """The same for a session whose client has no connection left; it may come back within this time."""
    max_sessions: PositiveInt = 1024
    """Sessions that may be open at once, over all clients."""
    answer_window: PositiveInt = 4
    """Answers of a session kept for a client that lost one and asks again."""
    answer_window_bytes: PositiveInt = 64 * MIB
    """Memory for kept answers over all sessions; the oldest go first."""


class RunConfig(Settings):
    """What training runs may hold on the trunk, and for how long."""

    tape_budget_bytes: PositiveInt = 8 * GIB
    """Memory for what forwards keep until their gradients come, and for the answers to those; over it, the
    oldest are forwarded again."""
    tape_lease_s: PositiveFloat = 600.0
    """How long a forward waits for its gradient before what it kept is let go."""
    staleness_limit: NonNegativeInt = 1
    """Optimizer steps that may lie between a forward and its backward; older gradients are refused."""
    member_lease_s: PositiveFloat = 60.0
    """A member of a cohort that neither works nor says that it is there is waited for no longer than this."""
    run_lease_s: PositiveFloat = 24 * 3600.0
    """A run that nobody has used for longer is closed; what was saved of it can be resumed from."""
    max_runs: PositiveInt = 64
    """Runs that may be open at once, over all clients."""
    max_adapters: PositiveInt = 64
    """Adapters that may be loaded for generation at once, beside those of the runs."""
    max_adapter_bytes: PositiveInt = GIB
    """Largest adapter that may be loaded."""
    max_ends_bytes: PositiveInt = 4 * GIB
    """Memory for what cohorts' members have given of their own ends to be averaged, and for those averages,
    of all runs together."""
    max_checkpoints: PositiveInt = 100
    """Checkpoints that one run may have on disk."""
    disk_budget_bytes: PositiveInt = 100 * GIB
    """Disk for all that lies in `state_dir`, of all runs together; a save that does not fit is refused."""


class QuotaConfig(Settings):
    """What one client may hold and have done, beside what all together may; left out, no limit."""

    max_sessions: PositiveInt | None = None
    """Sessions that one client may have open at once."""
    max_bytes: PositiveInt | None = None
    """Memory that one client may hold: keys and values of its sessions, weights, optimizer and gradients of
    its runs, adapters that it loaded, and what its forwards keep until their gradients come."""
    max_tokens_per_s: PositiveFloat | None = None
    """Tokens (rows times new tokens, of every step, forward and backward) that one client may have done each
    second; beyond that its own steps wait, and nobody else's."""
    burst_tokens: PositiveInt | None = None
    """Tokens that a client which paused may have done at once, by default those of one second."""
    turn_share: Share | None = None
    """Part of the turns that one client's prompts and training steps may have while others write texts: with
    0.005, one in 200 of their steps meets one. They are held back between two steps of a text, too."""


class AnomalyConfig(Settings):
    """What SplitTrainer does about gradients that are not what gradients should be, on both sides alike."""

    action: Literal["skip", "slow", "stop"] = "skip"
    """Skip the step, lower the learning rate for a while, or stop with a checkpoint."""
    spike_factor: NonNegativeFloat = 0.0
    """A norm so many times the median of those before it is an anomaly; 0 looks for numbers only."""
    vanishing_norm: NonNegativeFloat = 0.0
    """A norm below this is an anomaly."""
    window: PositiveInt = 50
    """Steps whose norms the median is taken of."""
    min_history: PositiveInt = 10
    """Steps before the first spike can be told."""
    slow_factor: PositiveFloat = 0.1
    """What `slow` multiplies the learning rate by."""
    slow_steps: PositiveInt = 20
    """How many further steps `slow` lowers it for."""


class WireLimits(Settings):
    """What a message may be; checked before anything is allocated for it."""

    max_message_bytes: PositiveInt = 512 * MIB
    """Largest step or answer, over all its chunks."""
    chunk_bytes: PositiveInt = MIB
    """A larger message is sent in pieces of this size; below 4 KiB, one of at most 4,096 pieces."""
    lanes: Annotated[int, Field(ge=1, le=16)] = 4
    """Connections that one stream spreads its large messages over; 1 for all on one."""
    max_rows: PositiveInt = 1024
    """Rows of one step."""
    max_tokens: PositiveInt = 1 << 20
    """Rows times tokens of one step."""


class ServerConfig(Settings):
    """What a trunk server is told when it starts."""

    model: str
    """Folder or hub id of the model whose trunk is held."""
    bottom_layers: PositiveInt = 2
    """Layers at the client's lower side; the server holds none of them."""
    top_layers: int = 2
    """Layers at the client's upper side; 0 needs `accept_label_leak`."""
    accept_label_leak: bool = False
    """Allow 0 top layers, where the returned gradient gives the labels away."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 50051
    """Port to listen on; 0 takes a free one."""
    device: str = "auto"
    """`cpu`, `cuda` or `cuda:1`; `auto` takes the first GPU if there is one."""
    dtype: DTypeName = "auto"
    """Precision of weights and KV cache; "auto" keeps the checkpoint's."""
    attention: AttentionName = "auto"
    """Attention implementation; `auto` takes `flash` (flash-attention) where it is installed and batching is
    not lost by it, then `sdpa`, then `eager`, and says why."""
    state_dir: Path = Field(default_factory=_state_dir)
    """Where training runs are saved, in a folder per model; made when the first is."""
    compile: CompileMode = "auto"
    """`default` runs decode steps at fixed shapes, on a GPU as CUDA graphs, which are recorded at the start;
    `max` compiles layers before (`torch.compile`), for training too: faster steps after a slow start; `auto`
    is `default` on a GPU and `off` elsewhere."""
    threads: NonNegativeInt = 0
    """CPU threads for the trunk's computation; 0 leaves torch's default."""
    drain_s: PositiveFloat = 30.0
    """How long a stopping server lets running steps, and the texts that are being written, finish."""
    checksum: bool = True
    """Check every tensor with xxh3; unnecessary under TLS, which checks by itself."""
    max_streams: PositiveInt = 1024
    """Streams that may be open at once; a client has up to two, and three further lanes for large tensors."""
    max_unanswered: PositiveInt = 64
    """Steps of one stream that may wait for their answers; further ones are not read meanwhile."""
    batching: BatchingConfig = BatchingConfig()
    sessions: SessionConfig = SessionConfig()
    runs: RunConfig = RunConfig()
    quotas: QuotaConfig = QuotaConfig()
    limits: WireLimits = WireLimits()


class ClientConfig(Settings):
    """What a client is told when it connects."""

    codec: CodecName = "raw"
    """How activations are written down: `raw` as they are, `half` float32 ones as bfloat16."""
    connect_s: PositiveFloat = 10.0
    """How long to wait for the server's first word."""
    prefill_s: PositiveFloat = 300.0
    """Deadline of a step with more than `decode_tokens` tokens."""
    decode_s: PositiveFloat = 60.0
    """Deadline of a step with few tokens."""
    train_s: PositiveFloat = 600.0
    """Deadline of a training step, of a call about a run, and of moving a session."""
    round_s: PositiveFloat = 3600.0
    """How long a member of a cohort waits for its round, asking again meanwhile."""
    reconnect_s: PositiveFloat = 120.0
    """How long a member of a cohort tries to reach a server that is gone."""
    checksum: bool = True
    """Check every tensor with xxh3; left out only if the server does without, too."""
    decode_tokens: PositiveInt = 64
    """Steps of up to this many tokens (rows times tokens) count as decode steps."""
    compile: CompileMode = "auto"
    """`default` runs the client's part of a decode step at fixed shapes, on a GPU as CUDA graphs; `max`
    compiles its layers before; `auto` is `default` on a GPU and `off` elsewhere."""
    limits: WireLimits = WireLimits()
