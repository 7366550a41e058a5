from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    INT64: _ClassVar[DType]
    INT32: _ClassVar[DType]
    UINT8: _ClassVar[DType]
    INT8: _ClassVar[DType]
    BOOL: _ClassVar[DType]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTIVATION: _ClassVar[Role]
    GRADIENT: _ClassVar[Role]
    MASK_COLUMNS: _ClassVar[Role]
    POSITIONS: _ClassVar[Role]
    SEGMENT_IDS: _ClassVar[Role]
    KEYS: _ClassVar[Role]
    VALUES: _ClassVar[Role]
    WEIGHT: _ClassVar[Role]
    NORMS: _ClassVar[Role]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RAW: _ClassVar[Codec]
    HALF: _ClassVar[Codec]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FORWARD: _ClassVar[Phase]
    BACKWARD: _ClassVar[Phase]
    GRADIENT_NORMS: _ClassVar[Phase]
    OPTIMIZER_STEP: _ClassVar[Phase]
    EVALUATE: _ClassVar[Phase]
    ENDS: _ClassVar[Phase]

class Fate(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FATE_UNSPECIFIED: _ClassVar[Fate]
    MERGED: _ClassVar[Fate]
    KEPT: _ClassVar[Fate]
    DROPPED: _ClassVar[Fate]

class ChecksumKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NO_CHECKSUM: _ClassVar[ChecksumKind]
    XXH3_64: _ClassVar[ChecksumKind]
    CRC32C: _ClassVar[ChecksumKind]

class ErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_UNSPECIFIED: _ClassVar[ErrorCode]
    SETTING: _ClassVar[ErrorCode]
    UNSUPPORTED_MODEL: _ClassVar[ErrorCode]
    UNSUPPORTED_CALL: _ClassVar[ErrorCode]
    ADAPTER: _ClassVar[ErrorCode]
    TRUNK_DRAINING: _ClassVar[ErrorCode]
    PROTOCOL_MISMATCH: _ClassVar[ErrorCode]
    MODEL_MISMATCH: _ClassVar[ErrorCode]
    SPLIT_MISMATCH: _ClassVar[ErrorCode]
    ACCESS_DENIED: _ClassVar[ErrorCode]
    FRAME: _ClassVar[ErrorCode]
    CORRUPT_FRAME: _ClassVar[ErrorCode]
    MESSAGE: _ClassVar[ErrorCode]
    STEP_OUT_OF_ORDER: _ClassVar[ErrorCode]
    SESSION_LOST: _ClassVar[ErrorCode]
    SESSION_EXPIRED: _ClassVar[ErrorCode]
    SESSION_TOO_LONG: _ClassVar[ErrorCode]
    RESOURCE_EXHAUSTED: _ClassVar[ErrorCode]
    KV_BUDGET_EXCEEDED: _ClassVar[ErrorCode]
    STEP_TIMEOUT: _ClassVar[ErrorCode]
    NOT_SERVED: _ClassVar[ErrorCode]
    TRUNK_FAILED: _ClassVar[ErrorCode]
    RUN_LOST: _ClassVar[ErrorCode]
    TAPE_EXPIRED: _ClassVar[ErrorCode]
    STALE_GRADIENT: _ClassVar[ErrorCode]
    CHECKPOINT: _ClassVar[ErrorCode]
    RUN_BROKEN: _ClassVar[ErrorCode]
    RUN_TAKEN_OVER: _ClassVar[ErrorCode]
    ROUND_UNFINISHED: _ClassVar[ErrorCode]
    CONTRIBUTION_LOST: _ClassVar[ErrorCode]
DTYPE_UNSPECIFIED: DType
FLOAT32: DType
BFLOAT16: DType
FLOAT16: DType
INT64: DType
INT32: DType
UINT8: DType
INT8: DType
BOOL: DType
ACTIVATION: Role
GRADIENT: Role
MASK_COLUMNS: Role
POSITIONS: Role
SEGMENT_IDS: Role
KEYS: Role
VALUES: Role
WEIGHT: Role
NORMS: Role
RAW: Codec
HALF: Codec
FORWARD: Phase
BACKWARD: Phase
GRADIENT_NORMS: Phase
OPTIMIZER_STEP: Phase
EVALUATE: Phase
ENDS: Phase
FATE_UNSPECIFIED: Fate
MERGED: Fate
KEPT: Fate
DROPPED: Fate
NO_CHECKSUM: ChecksumKind
XXH3_64: ChecksumKind
CRC32C: ChecksumKind
ERROR_UNSPECIFIED: ErrorCode
SETTING: ErrorCode
UNSUPPORTED_MODEL: ErrorCode
UNSUPPORTED_CALL: ErrorCode
ADAPTER: ErrorCode
TRUNK_DRAINING: ErrorCode
PROTOCOL_MISMATCH: ErrorCode
MODEL_MISMATCH: ErrorCode
SPLIT_MISMATCH: ErrorCode
ACCESS_DENIED: ErrorCode
FRAME: ErrorCode
CORRUPT_FRAME: ErrorCode
MESSAGE: ErrorCode
STEP_OUT_OF_ORDER: ErrorCode
SESSION_LOST: ErrorCode
SESSION_EXPIRED: ErrorCode
SESSION_TOO_LONG: ErrorCode
RESOURCE_EXHAUSTED: ErrorCode
KV_BUDGET_EXCEEDED: ErrorCode
STEP_TIMEOUT: ErrorCode
NOT_SERVED: ErrorCode
TRUNK_FAILED: ErrorCode
RUN_LOST: ErrorCode
TAPE_EXPIRED: ErrorCode
STALE_GRADIENT: ErrorCode
CHECKPOINT: ErrorCode
RUN_BROKEN: ErrorCode
RUN_TAKEN_OVER: ErrorCode
ROUND_UNFINISHED: ErrorCode
CONTRIBUTION_LOST: ErrorCode

class CodecParameters(_message.Message):
    __slots__ = ("group_size", "bits", "ratio", "scales")
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    RATIO_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    group_size: int
    bits: int
    ratio: float
    scales: bytes
    def __init__(self, group_size: _Optional[int] = ..., bits: _Optional[int] = ..., ratio: _Optional[float] = ..., scales: _Optional[bytes] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("dtype", "shape", "data", "checksum", "role", "codec", "parameters", "reference_step", "name")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_STEP_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    checksum: int
    role: Role
    codec: Codec
    parameters: CodecParameters
    reference_step: int
    name: str
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., checksum: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., codec: _Optional[_Union[Codec, str]] = ..., parameters: _Optional[_Union[CodecParameters, _Mapping]] = ..., reference_step: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class StepKey(_message.Message):
    __slots__ = ("session", "run", "step", "incarnation", "microbatch", "phase")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    session: int
    run: int
    step: int
    incarnation: int
    microbatch: int
    phase: Phase
    def __init__(self, session: _Optional[int] = ..., run: _Optional[int] = ..., step: _Optional[int] = ..., incarnation: _Optional[int] = ..., microbatch: _Optional[int] = ..., phase: _Optional[_Union[Phase, str]] = ...) -> None: ...

class Precision(_message.Message):
    __slots__ = ("weights", "autocast", "wire")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    AUTOCAST_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    weights: DType
    autocast: DType
    wire: DType
    def __init__(self, weights: _Optional[_Union[DType, str]] = ..., autocast: _Optional[_Union[DType, str]] = ..., wire: _Optional[_Union[DType, str]] = ...) -> None: ...

class AdapterVersion(_message.Message):
    __slots__ = ("adapter", "version", "follow")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    version: int
    follow: bool
    def __init__(self, adapter: _Optional[str] = ..., version: _Optional[int] = ..., follow: bool = ...) -> None: ...

class OpenSession(_message.Message):
    __slots__ = ("adapter", "precision")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    adapter: AdapterVersion
    precision: Precision
    def __init__(self, adapter: _Optional[_Union[AdapterVersion, _Mapping]] = ..., precision: _Optional[_Union[Precision, _Mapping]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("key", "activation", "open", "acked_through", "mask_columns", "positions", "keep_positions", "select_rows", "deadline_s", "priority", "trace_id", "want_input_gradient", "loss_scale", "weight", "adapter", "segment_ids", "seed", "optimizer", "ends")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ACKED_THROUGH_FIELD_NUMBER: _ClassVar[int]
    MASK_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    KEEP_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    SELECT_ROWS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    WANT_INPUT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_IDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    key: StepKey
    activation: Frame
    open: OpenSession
    acked_through: int
    mask_columns: Frame
    positions: Frame
    keep_positions: int
    select_rows: _containers.RepeatedScalarFieldContainer[int]
    deadline_s: float
    priority: int
    trace_id: bytes
    want_input_gradient: bool
    loss_scale: float
    weight: float
    adapter: AdapterVersion
    segment_ids: Frame
    seed: int
    optimizer: OptimizerStep
    ends: _containers.RepeatedCompositeFieldContainer[Frame]
    def __init__(self, key: _Optional[_Union[StepKey, _Mapping]] = ..., activation: _Optional[_Union[Frame, _Mapping]] = ..., open: _Optional[_Union[OpenSession, _Mapping]] = ..., acked_through: _Optional[int] = ..., mask_columns: _Optional[_Union[Frame, _Mapping]] = ..., positions: _Optional[_Union[Frame, _Mapping]] = ..., keep_positions: _Optional[int] = ..., select_rows: _Optional[_Iterable[int]] = ..., deadline_s: _Optional[float] = ..., priority: _Optional[int] = ..., trace_id: _Optional[bytes] = ..., want_input_gradient: bool = ..., loss_scale: _Optional[float] = ..., weight: _Optional[float] = ..., adapter: _Optional[_Union[AdapterVersion, _Mapping]] = ..., segment_ids: _Optional[_Union[Frame, _Mapping]] = ..., seed: _Optional[int] = ..., optimizer: _Optional[_Union[OptimizerStep, _Mapping]] = ..., ends: _Optional[_Iterable[_Union[Frame, _Mapping]]] = ...) -> None: ...

class OptimizerStep(_message.Message):
    __slots__ = ("gradient_scale", "learning_rate", "skip")
    GRADIENT_SCALE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    gradient_scale: float
    learning_rate: float
    skip: bool
    def __init__(self, gradient_scale: _Optional[float] = ..., learning_rate: _Optional[float] = ..., skip: bool = ...) -> None: ...

class ForkSession(_message.Message):
    __slots__ = ("session", "into", "incarnation", "at_step")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INTO_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    AT_STEP_FIELD_NUMBER: _ClassVar[int]
    session: int
    into: int
    incarnation: int
    at_step: int
    def __init__(self, session: _Optional[int] = ..., into: _Optional[int] = ..., incarnation: _Optional[int] = ..., at_step: _Optional[int] = ...) -> None: ...

class CloseSession(_message.Message):
    __slots__ = ("session", "incarnation")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    session: int
    incarnation: int
    def __init__(self, session: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queued_us", "device_us", "copied_us")
    QUEUED_US_FIELD_NUMBER: _ClassVar[int]
    DEVICE_US_FIELD_NUMBER: _ClassVar[int]
    COPIED_US_FIELD_NUMBER: _ClassVar[int]
    queued_us: int
    device_us: int
    copied_us: int
    def __init__(self, queued_us: _Optional[int] = ..., device_us: _Optional[int] = ..., copied_us: _Optional[int] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("key", "activation", "timings", "adapter", "norms", "error", "stepped", "merged", "ends")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    STEPPED_FIELD_NUMBER: _ClassVar[int]
    MERGED_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    key: StepKey
    activation: Frame
    timings: Timings
    adapter: AdapterVersion
    norms: Frame
    error: Error
    stepped: bool
    merged: Merged
    ends: _containers.RepeatedCompositeFieldContainer[Frame]
    def __init__(self, key: _Optional[_Union[StepKey, _Mapping]] = ..., activation: _Optional[_Union[Frame, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., adapter: _Optional[_Union[AdapterVersion, _Mapping]] = ..., norms: _Optional[_Union[Frame, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., stepped: bool = ..., merged: _Optional[_Union[Merged, _Mapping]] = ..., ends: _Optional[_Iterable[_Union[Frame, _Mapping]]] = ...) -> None: ...

class Merged(_message.Message):
    __slots__ = ("fate", "round", "staleness", "members")
    FATE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    fate: Fate
    round: int
    staleness: int
    members: int
    def __init__(self, fate: _Optional[_Union[Fate, str]] = ..., round: _Optional[int] = ..., staleness: _Optional[int] = ..., members: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("number", "data", "total_bytes", "offset", "tensor_bytes", "checksum")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    number: int
    data: bytes
    total_bytes: int
    offset: int
    tensor_bytes: int
    checksum: int
    def __init__(self, number: _Optional[int] = ..., data: _Optional[bytes] = ..., total_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., tensor_bytes: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class ClientMessage(_message.Message):
    __slots__ = ("step", "hello", "fork", "close", "chunk")
    STEP_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    FORK_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    step: Step
    hello: Hello
    fork: ForkSession
    close: CloseSession
    chunk: Chunk
    def __init__(self, step: _Optional[_Union[Step, _Mapping]] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., fork: _Optional[_Union[ForkSession, _Mapping]] = ..., close: _Optional[_Union[CloseSession, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("answer", "welcome", "forked", "chunk", "error")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    FORKED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    answer: Answer
    welcome: Welcome
    forked: Forked
    chunk: Chunk
    error: Error
    def __init__(self, answer: _Optional[_Union[Answer, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., forked: _Optional[_Union[Forked, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Forked(_message.Message):
    __slots__ = ("session", "error")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    session: int
    error: Error
    def __init__(self, session: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Fingerprint(_message.Message):
    __slots__ = ("config_hash", "weights_hash", "bottom_layers", "trunk_layers", "top_layers")
    CONFIG_HASH_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_HASH_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    TRUNK_LAYERS_FIELD_NUMBER: _ClassVar[int]
    TOP_LAYERS_FIELD_NUMBER: _ClassVar[int]
    config_hash: int
    weights_hash: int
    bottom_layers: int
    trunk_layers: int
    top_layers: int
    def __init__(self, config_hash: _Optional[int] = ..., weights_hash: _Optional[int] = ..., bottom_layers: _Optional[int] = ..., trunk_layers: _Optional[int] = ..., top_layers: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "features", "fingerprint", "client", "codecs", "checksums", "precision", "software", "lane_of")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    LANE_OF_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    features: _containers.RepeatedScalarFieldContainer[str]
    fingerprint: Fingerprint
    client: bytes
    codecs: _containers.RepeatedScalarFieldContainer[Codec]
    checksums: _containers.RepeatedScalarFieldContainer[ChecksumKind]
    precision: Precision
    software: str
    lane_of: bytes
    def __init__(self, protocol: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., client: _Optional[bytes] = ..., codecs: _Optional[_Iterable[_Union[Codec, str]]] = ..., checksums: _Optional[_Iterable[_Union[ChecksumKind, str]]] = ..., precision: _Optional[_Union[Precision, _Mapping]] = ..., software: _Optional[str] = ..., lane_of: _Optional[bytes] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "features", "fingerprint", "codecs", "checksum", "precision", "limits", "software", "attention", "ticket")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    features: _containers.RepeatedScalarFieldContainer[str]
    fingerprint: Fingerprint
    codecs: _containers.RepeatedScalarFieldContainer[Codec]
    checksum: ChecksumKind
    precision: Precision
    limits: Limits
    software: str
    attention: str
    ticket: bytes
    def __init__(self, protocol: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., codecs: _Optional[_Iterable[_Union[Codec, str]]] = ..., checksum: _Optional[_Union[ChecksumKind, str]] = ..., precision: _Optional[_Union[Precision, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., software: _Optional[str] = ..., attention: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "chunk_bytes", "max_rows", "max_tokens", "session_tokens", "max_positions", "lease_s", "answer_window", "lanes")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SESSION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    ANSWER_WINDOW_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    chunk_bytes: int
    max_rows: int
    max_tokens: int
    session_tokens: int
    max_positions: int
    lease_s: float
    answer_window: int
    lanes: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., max_rows: _Optional[int] = ..., max_tokens: _Optional[int] = ..., session_tokens: _Optional[int] = ..., max_positions: _Optional[int] = ..., lease_s: _Optional[float] = ..., answer_window: _Optional[int] = ..., lanes: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("protocol", "software", "features", "fingerprint", "precision", "limits", "codecs", "model_type", "hidden_size", "device", "attention", "batched", "batched_reason", "kv_bytes_total", "kv_bytes_free", "sessions", "runs", "draining", "attention_reason")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    BATCHED_FIELD_NUMBER: _ClassVar[int]
    BATCHED_REASON_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FREE_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_REASON_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    software: str
    features: _containers.RepeatedScalarFieldContainer[str]
    fingerprint: Fingerprint
    precision: Precision
    limits: Limits
    codecs: _containers.RepeatedScalarFieldContainer[Codec]
    model_type: str
    hidden_size: int
    device: str
    attention: str
    batched: bool
    batched_reason: str
    kv_bytes_total: int
    kv_bytes_free: int
    sessions: int
    runs: int
    draining: bool
    attention_reason: str
    def __init__(self, protocol: _Optional[int] = ..., software: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., precision: _Optional[_Union[Precision, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., codecs: _Optional[_Iterable[_Union[Codec, str]]] = ..., model_type: _Optional[str] = ..., hidden_size: _Optional[int] = ..., device: _Optional[str] = ..., attention: _Optional[str] = ..., batched: bool = ..., batched_reason: _Optional[str] = ..., kv_bytes_total: _Optional[int] = ..., kv_bytes_free: _Optional[int] = ..., sessions: _Optional[int] = ..., runs: _Optional[int] = ..., draining: bool = ..., attention_reason: _Optional[str] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "figures", "current_step", "current_version", "retry_after_ms")
    class FiguresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    CURRENT_STEP_FIELD_NUMBER: _ClassVar[int]
    CURRENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: ErrorCode
    message: str
    figures: _containers.ScalarMap[str, float]
    current_step: int
    current_version: int
    retry_after_ms: int
    def __init__(self, code: _Optional[_Union[ErrorCode, str]] = ..., message: _Optional[str] = ..., figures: _Optional[_Mapping[str, float]] = ..., current_step: _Optional[int] = ..., current_version: _Optional[int] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class LoraSettings(_message.Message):
    __slots__ = ("r", "alpha", "dropout", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "exclude_modules")
    class RankPatternEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class AlphaPatternEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    R_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    USE_RSLORA_FIELD_NUMBER: _ClassVar[int]
    USE_DORA_FIELD_NUMBER: _ClassVar[int]
    RANK_PATTERN_FIELD_NUMBER: _ClassVar[int]
    ALPHA_PATTERN_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_MODULES_FIELD_NUMBER: _ClassVar[int]
    r: int
    alpha: float
    dropout: float
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    use_rslora: bool
    use_dora: bool
    rank_pattern: _containers.ScalarMap[str, int]
    alpha_pattern: _containers.ScalarMap[str, float]
    exclude_modules: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, r: _Optional[int] = ..., alpha: _Optional[float] = ..., dropout: _Optional[float] = ..., target_modules: _Optional[_Iterable[str]] = ..., use_rslora: bool = ..., use_dora: bool = ..., rank_pattern: _Optional[_Mapping[str, int]] = ..., alpha_pattern: _Optional[_Mapping[str, float]] = ..., exclude_modules: _Optional[_Iterable[str]] = ...) -> None: ...

class OptimizerSettings(_message.Message):
    __slots__ = ("name", "learning_rate", "weight_decay", "beta1", "beta2", "epsilon", "momentum")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    name: str
    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    momentum: float
    def __init__(self, name: _Optional[str] = ..., learning_rate: _Optional[float] = ..., weight_decay: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., epsilon: _Optional[float] = ..., momentum: _Optional[float] = ...) -> None: ...

class CohortSettings(_message.Message):
    __slots__ = ("rule", "members", "quorum", "timeout_s", "buffer", "staleness_exponent", "staleness_limit", "carry_late", "age_limit_s", "weighting", "clip_norm", "aggregation", "member_norm", "byzantine", "max_weight", "max_rate")
    RULE_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    BUFFER_FIELD_NUMBER: _ClassVar[int]
    STALENESS_EXPONENT_FIELD_NUMBER: _ClassVar[int]
    STALENESS_LIMIT_FIELD_NUMBER: _ClassVar[int]
    CARRY_LATE_FIELD_NUMBER: _ClassVar[int]
    AGE_LIMIT_S_FIELD_NUMBER: _ClassVar[int]
    WEIGHTING_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    MEMBER_NORM_FIELD_NUMBER: _ClassVar[int]
    BYZANTINE_FIELD_NUMBER: _ClassVar[int]
    MAX_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_RATE_FIELD_NUMBER: _ClassVar[int]
    rule: str
    members: int
    quorum: int
    timeout_s: float
    buffer: int
    staleness_exponent: float
    staleness_limit: int
    carry_late: bool
    age_limit_s: float
    weighting: str
    clip_norm: float
    aggregation: str
    member_norm: float
    byzantine: int
    max_weight: float
    max_rate: float
    def __init__(self, rule: _Optional[str] = ..., members: _Optional[int] = ..., quorum: _Optional[int] = ..., timeout_s: _Optional[float] = ..., buffer: _Optional[int] = ..., staleness_exponent: _Optional[float] = ..., staleness_limit: _Optional[int] = ..., carry_late: bool = ..., age_limit_s: _Optional[float] = ..., weighting: _Optional[str] = ..., clip_norm: _Optional[float] = ..., aggregation: _Optional[str] = ..., member_norm: _Optional[float] = ..., byzantine: _Optional[int] = ..., max_weight: _Optional[float] = ..., max_rate: _Optional[float] = ...) -> None: ...

class ShareSettings(_message.Message):
    __slots__ = ("rule", "every", "proximal")
    RULE_FIELD_NUMBER: _ClassVar[int]
    EVERY_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_FIELD_NUMBER: _ClassVar[int]
    rule: str
    every: int
    proximal: float
    def __init__(self, rule: _Optional[str] = ..., every: _Optional[int] = ..., proximal: _Optional[float] = ...) -> None: ...

class TapeSettings(_message.Message):
    __slots__ = ("recompute", "checkpoint_every", "lease_s")
    RECOMPUTE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_EVERY_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    recompute: bool
    checkpoint_every: int
    lease_s: float
    def __init__(self, recompute: bool = ..., checkpoint_every: _Optional[int] = ..., lease_s: _Optional[float] = ...) -> None: ...

class OpenRunRequest(_message.Message):
    __slots__ = ("name", "client", "lora", "optimizer", "cohort", "tape", "precision", "seed", "accumulation", "allow_download", "start_from", "member", "share")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    TAPE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATION_FIELD_NUMBER: _ClassVar[int]
    ALLOW_DOWNLOAD_FIELD_NUMBER: _ClassVar[int]
    START_FROM_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    name: str
    client: bytes
    lora: LoraSettings
    optimizer: OptimizerSettings
    cohort: CohortSettings
    tape: TapeSettings
    precision: Precision
    seed: int
    accumulation: int
    allow_download: bool
    start_from: str
    member: str
    share: ShareSettings
    def __init__(self, name: _Optional[str] = ..., client: _Optional[bytes] = ..., lora: _Optional[_Union[LoraSettings, _Mapping]] = ..., optimizer: _Optional[_Union[OptimizerSettings, _Mapping]] = ..., cohort: _Optional[_Union[CohortSettings, _Mapping]] = ..., tape: _Optional[_Union[TapeSettings, _Mapping]] = ..., precision: _Optional[_Union[Precision, _Mapping]] = ..., seed: _Optional[int] = ..., accumulation: _Optional[int] = ..., allow_download: bool = ..., start_from: _Optional[str] = ..., member: _Optional[str] = ..., share: _Optional[_Union[ShareSettings, _Mapping]] = ...) -> None: ...

class JoinRunRequest(_message.Message):
    __slots__ = ("name", "client", "incarnation", "member")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    name: str
    client: bytes
    incarnation: int
    member: str
    def __init__(self, name: _Optional[str] = ..., client: _Optional[bytes] = ..., incarnation: _Optional[int] = ..., member: _Optional[str] = ...) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("name", "client")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    client: bytes
    def __init__(self, name: _Optional[str] = ..., client: _Optional[bytes] = ...) -> None: ...

class SaveRunRequest(_message.Message):
    __slots__ = ("name", "client", "step", "acknowledged_step", "kept_steps", "run", "incarnation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_STEP_FIELD_NUMBER: _ClassVar[int]
    KEPT_STEPS_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    client: bytes
    step: int
    acknowledged_step: int
    kept_steps: _containers.RepeatedScalarFieldContainer[int]
    run: int
    incarnation: int
    def __init__(self, name: _Optional[str] = ..., client: _Optional[bytes] = ..., step: _Optional[int] = ..., acknowledged_step: _Optional[int] = ..., kept_steps: _Optional[_Iterable[int]] = ..., run: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class RestoreRunRequest(_message.Message):
    __slots__ = ("name", "client", "step", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    client: bytes
    step: int
    digest: int
    def __init__(self, name: _Optional[str] = ..., client: _Optional[bytes] = ..., step: _Optional[int] = ..., digest: _Optional[int] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("incarnation", "state", "last_step", "lease_left_s", "name", "last", "version")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    LEASE_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    state: str
    last_step: int
    lease_left_s: float
    name: str
    last: Merged
    version: int
    def __init__(self, incarnation: _Optional[int] = ..., state: _Optional[str] = ..., last_step: _Optional[int] = ..., lease_left_s: _Optional[float] = ..., name: _Optional[str] = ..., last: _Optional[_Union[Merged, _Mapping]] = ..., version: _Optional[int] = ...) -> None: ...

class RunReply(_message.Message):
    __slots__ = ("name", "run", "state", "step", "version", "incarnation", "members", "checkpoints", "lora", "optimizer", "cohort", "bytes_on_disk", "precision", "seed", "allow_download", "checkpoint_digests", "member", "share", "active_members", "known_members")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    BYTES_ON_DISK_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ALLOW_DOWNLOAD_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_MEMBERS_FIELD_NUMBER: _ClassVar[int]
    KNOWN_MEMBERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    run: int
    state: str
    step: int
    version: int
    incarnation: int
    members: _containers.RepeatedCompositeFieldContainer[Member]
    checkpoints: _containers.RepeatedScalarFieldContainer[int]
    lora: LoraSettings
    optimizer: OptimizerSettings
    cohort: CohortSettings
    bytes_on_disk: int
    precision: Precision
    seed: int
    allow_download: bool
    checkpoint_digests: _containers.RepeatedScalarFieldContainer[int]
    member: str
    share: ShareSettings
    active_members: int
    known_members: int
    def __init__(self, name: _Optional[str] = ..., run: _Optional[int] = ..., state: _Optional[str] = ..., step: _Optional[int] = ..., version: _Optional[int] = ..., incarnation: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., checkpoints: _Optional[_Iterable[int]] = ..., lora: _Optional[_Union[LoraSettings, _Mapping]] = ..., optimizer: _Optional[_Union[OptimizerSettings, _Mapping]] = ..., cohort: _Optional[_Union[CohortSettings, _Mapping]] = ..., bytes_on_disk: _Optional[int] = ..., precision: _Optional[_Union[Precision, _Mapping]] = ..., seed: _Optional[int] = ..., allow_download: bool = ..., checkpoint_digests: _Optional[_Iterable[int]] = ..., member: _Optional[str] = ..., share: _Optional[_Union[ShareSettings, _Mapping]] = ..., active_members: _Optional[int] = ..., known_members: _Optional[int] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ("client",)
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    client: bytes
    def __init__(self, client: _Optional[bytes] = ...) -> None: ...

class ListRunsReply(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunReply]
    def __init__(self, runs: _Optional[_Iterable[_Union[RunReply, _Mapping]]] = ...) -> None: ...

class DeleteReply(_message.Message):
    __slots__ = ("freed_bytes",)
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    def __init__(self, freed_bytes: _Optional[int] = ...) -> None: ...

class AdapterRequest(_message.Message):
    __slots__ = ("name", "version", "client")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    client: bytes
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., client: _Optional[bytes] = ...) -> None: ...

class AdapterPart(_message.Message):
    __slots__ = ("name", "version", "lora", "weights", "last", "client", "given", "averaged")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    GIVEN_FIELD_NUMBER: _ClassVar[int]
    AVERAGED_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    lora: LoraSettings
    weights: _containers.RepeatedCompositeFieldContainer[Frame]
    last: bool
    client: bytes
    given: GivenEnds
    averaged: AveragedEnds
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., lora: _Optional[_Union[LoraSettings, _Mapping]] = ..., weights: _Optional[_Iterable[_Union[Frame, _Mapping]]] = ..., last: bool = ..., client: _Optional[bytes] = ..., given: _Optional[_Union[GivenEnds, _Mapping]] = ..., averaged: _Optional[_Union[AveragedEnds, _Mapping]] = ...) -> None: ...

class GivenEnds(_message.Message):
    __slots__ = ("run", "incarnation", "weight", "frozen_digest")
    RUN_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    FROZEN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    run: int
    incarnation: int
    weight: float
    frozen_digest: int
    def __init__(self, run: _Optional[int] = ..., incarnation: _Optional[int] = ..., weight: _Optional[float] = ..., frozen_digest: _Optional[int] = ...) -> None: ...

class AveragedEnds(_message.Message):
    __slots__ = ("due", "members", "aggregation_residual", "since_start")
    DUE_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    SINCE_START_FIELD_NUMBER: _ClassVar[int]
    due: int
    members: int
    aggregation_residual: float
    since_start: bool
    def __init__(self, due: _Optional[int] = ..., members: _Optional[int] = ..., aggregation_residual: _Optional[float] = ..., since_start: bool = ...) -> None: ...

class AverageRequest(_message.Message):
    __slots__ = ("name", "client", "run", "incarnation", "number", "since")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    client: bytes
    run: int
    incarnation: int
    number: int
    since: int
    def __init__(self, name: _Optional[str] = ..., client: _Optional[bytes] = ..., run: _Optional[int] = ..., incarnation: _Optional[int] = ..., number: _Optional[int] = ..., since: _Optional[int] = ...) -> None: ...

class AdapterReply(_message.Message):
    __slots__ = ("name", "version", "bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    bytes: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class ExportSessionRequest(_message.Message):
    __slots__ = ("session", "incarnation", "client")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    session: int
    incarnation: int
    client: bytes
    def __init__(self, session: _Optional[int] = ..., incarnation: _Optional[int] = ..., client: _Optional[bytes] = ...) -> None: ...

class SessionPart(_message.Message):
    __slots__ = ("session", "incarnation", "client", "next_step", "layer", "first_position", "keys", "values", "mask_columns", "adapter", "last", "fingerprint", "precision", "first_row", "rows", "length", "adapter_digest")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    MASK_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    session: int
    incarnation: int
    client: bytes
    next_step: int
    layer: int
    first_position: int
    keys: Frame
    values: Frame
    mask_columns: Frame
    adapter: AdapterVersion
    last: bool
    fingerprint: Fingerprint
    precision: Precision
    first_row: int
    rows: int
    length: int
    adapter_digest: int
    def __init__(self, session: _Optional[int] = ..., incarnation: _Optional[int] = ..., client: _Optional[bytes] = ..., next_step: _Optional[int] = ..., layer: _Optional[int] = ..., first_position: _Optional[int] = ..., keys: _Optional[_Union[Frame, _Mapping]] = ..., values: _Optional[_Union[Frame, _Mapping]] = ..., mask_columns: _Optional[_Union[Frame, _Mapping]] = ..., adapter: _Optional[_Union[AdapterVersion, _Mapping]] = ..., last: bool = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., precision: _Optional[_Union[Precision, _Mapping]] = ..., first_row: _Optional[int] = ..., rows: _Optional[int] = ..., length: _Optional[int] = ..., adapter_digest: _Optional[int] = ...) -> None: ...

class ImportSessionReply(_message.Message):
    __slots__ = ("session", "incarnation", "next_step")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    session: int
    incarnation: int
    next_step: int
    def __init__(self, session: _Optional[int] = ..., incarnation: _Optional[int] = ..., next_step: _Optional[int] = ...) -> None: ...
