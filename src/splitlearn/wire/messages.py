"""What client and engine say to each other, as plain values: no protobuf, no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from splitlearn.errors import SplitLearnError
from splitlearn.vocabulary import LoraSettings, Merged, Precision, RunSettings, StepKey, Timings, Versions

# B rows   T tokens   D hidden   H key/value heads   E head size

OPEN, BROKEN, SAVED = "open", "broken", "saved"
"""Where a run is: in memory, in memory and half stepped, on disk alone."""


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Rides in a session's first step: which adapter it generates with, at which precision."""

    adapter: Versions = Versions()
    follow: bool = False
    precision: Precision = Precision()


@dataclass(frozen=True, slots=True)
class StepMessage:
    """One step of a session, or one lone forward without a cache.

    `mask_columns_BT` is None where every new column counts; `positions_BT` is None where they go on
    from the session's length. The session is first cropped to `keep_positions`, then its rows
    become `select_rows`, then `activation_BTD` is run.
    """

    key: StepKey
    activation_BTD: Tensor
    open: OpenSession | None = None
    mask_columns_BT: Tensor | None = None
    positions_BT: Tensor | None = None
    keep_positions: int | None = None
    select_rows: tuple[int, ...] | None = None
    acked_through: int = 0
    deadline_s: float = 0.0
    priority: int = 0

    @property
    def rows(self) -> int:
        return self.activation_BTD.shape[0]

    @property
    def tokens(self) -> int:
        return self.activation_BTD.shape[1]


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """Scale the run's gradients, then step; `skip` drops them instead: they overflowed somewhere.

    In a cohort the scaled gradients are a mean, over so much `weight` of the round's batch (tokens or
    examples, as the cohort weighs).
    """

    gradient_scale: float = 1.0
    learning_rate: float = 0.0
    skip: bool = False
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class RunStepMessage:
    """One step of a run; what it does is its key's phase.

    `tensor_BTD` is the activation at the lower cut (forward, evaluate) or the gradient at the upper
    cut, times `loss_scale` (backward). `seed` is that of dropout; 0 is none, as in evaluation. The
    client has the answers to the backwards of its step's microbatches below `acked_through`.

    Where a run trains bottom and top, too, `ends` are their gradients (optimizer step), or what they begin
    with (ends), by the names in a PEFT file less its prefix; `ends_version` is that of the client's.
    """

    key: StepKey
    tensor_BTD: Tensor | None = None
    mask_columns_BT: Tensor | None = None
    positions_BT: Tensor | None = None
    want_input_gradient: bool = True
    loss_scale: float = 1.0
    seed: int = 0
    optimizer: OptimizerStep | None = None
    acked_through: int = 0
    deadline_s: float = 0.0
    ends: Mapping[str, Tensor] = field(default_factory=dict)
    ends_version: int | None = None

    @property
    def rows(self) -> int:
        return 0 if self.tensor_BTD is None else self.tensor_BTD.shape[0]

    @property
    def tokens(self) -> int:
        return 0 if self.tensor_BTD is None else self.tensor_BTD.shape[1]


@dataclass(frozen=True, slots=True)
class AnswerMessage:
    """What came of a step: an activation or a gradient (B, T, D), norms of gradients, or an error.

    `norms` are one a weight of the trunk's adapter, in the model's order; -1 where there is no gradient.
    `ends` are the adapters of bottom and top, where the run trains them, at the version in `versions`.
    """

    key: StepKey
    activation_BTD: Tensor | None = None
    timings: Timings = Timings()
    versions: Versions = Versions()
    error: SplitLearnError | None = None
    norms: Tensor | None = None
    stepped: bool = False
    merged: Merged | None = None
    ends: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ForkMessage:
    """Copy a session as it stands after `at_step`; the copy is called `into`."""

    session: int
    into: int
    incarnation: int = 0
    at_step: int = 0


@dataclass(frozen=True, slots=True)
class CloseMessage:
    """The session is over: free what it holds."""

    session: int
    incarnation: int = 0


@dataclass(frozen=True, slots=True)
class SessionHead:
    """What a session that moves is, beside its keys and values.

    `next_step` is where it stood when it was exported; `precision.weights` is its cache's dtype, and
    `adapter_digest` tells its adapter's weights from others of the same name and version.
    """

    rows: int
    length: int
    next_step: int = 1
    adapter: Versions = Versions()
    adapter_digest: int = 0
    follow: bool = False
    precision: Precision = Precision()


@dataclass(frozen=True, slots=True)
class SessionPart:
    """Keys and values (B, H, T, E) of a box of one layer of the trunk, which begins at this row and position.

    `visible_BT` says, in layer 0, which of its tokens may be looked at; None is all.
    """

    layer: int
    first_row: int
    first_position: int
    keys_BHTE: Tensor
    values_BHTE: Tensor
    visible_BT: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TrunkFacts:
    """What a trunk says of itself; lengths in tokens, memory in bytes."""

    protocol: int = 0
    software: str = ""
    features: frozenset[str] = field(default_factory=frozenset)
    model_type: str = ""
    hidden_size: int = 0
    bottom_layers: int = 0
    trunk_layers: int = 0
    top_layers: int = 0
    config_hash: int = 0
    weights_hash: int = 0
    precision: Precision = Precision()
    device: str = ""
    attention: str = ""
    attention_reason: str = ""
    batched: bool = True
    batched_reason: str = ""
    session_tokens: int = 0
    max_positions: int = 0
    lease_s: float = 0.0
    kv_bytes_total: int = 0
    kv_bytes_free: int = 0
    sessions: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class OpenRun:
    """Begin a run under this name; in a cohort as the member of this name."""

    name: str
    settings: RunSettings = RunSettings()
    start_from: str = ""
    member: str = ""


@dataclass(frozen=True, slots=True)
class MemberFacts:
    """Where a member of a cohort stands: its last step that was done, and the seconds left of its lease.

    `last` is what became of that step's gradients (None where it was skipped), `version` what the step
    underway is computed at.
    """

    name: str
    state: str = ""
    incarnation: int = 0
    step: int = 0
    lease_left_s: float = 0.0
    last: Merged | None = None
    version: int | None = None


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Where a run stands: `step` optimizer steps are done, `checkpoints` are those on disk.

    `digests` are theirs, in their order. A cohort has `members`, whom only members are told; the counts
    are for everybody: those whom rounds wait for, and all that it has had.
    """

    name: str
    number: int = 0
    incarnation: int = 0
    state: str = ""
    step: int = 0
    version: int = 0
    settings: RunSettings = RunSettings()
    checkpoints: tuple[int, ...] = ()
    bytes_on_disk: int = 0
    digests: tuple[int, ...] = ()
    members: tuple[MemberFacts, ...] = ()
    member: str = ""
    active_members: int = 0
    known_members: int = 0

    @property
    def own(self) -> MemberFacts | None:
        """Who is answered, where it is a member: `number` and `incarnation` are its own then."""
        return next((each for each in self.members if each.name == self.member), None)

    def digest_of(self, step: int) -> int:
        """What tells the checkpoint of this step from any other; 0 where it is not known."""
        return dict(zip(self.checkpoints, self.digests, strict=False)).get(step, 0)


@dataclass(frozen=True, slots=True)
class AdapterMessage:
    """The trunk's part of an adapter, by the names that PEFT gives weights in a file, less its prefix."""

    name: str
    version: int = 0
    lora: LoraSettings = LoraSettings()
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class GivenEnds:
    """What a member gives to average `number` of its run: LoRA weights, by PEFT's names less the prefix.

    `weight` is what they count; `frozen` a digest of what is not trained, and the same for all members.
    """

    number: int
    weight: float
    frozen: int
    weights: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.weights.values())


@dataclass(frozen=True, slots=True, eq=False)
class AveragedEnds:
    """Average `number`, of so many members' ends; the next is due when the run is at version `due`.

    `residual` is by module what its base gets in addition, as two thin factors (out, rank) and (rank, in):
    since the average before, or `since_start`. `aggregation_residual` is what is still missing of the mean
    of the products.
    """

    number: int
    due: int
    members: int
    aggregation_residual: float
    weights: Mapping[str, Tensor]
    residual: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    since_start: bool = False
