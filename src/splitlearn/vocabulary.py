"""The project's nouns: what a step, its phase, its precision and a tensor's role are called everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Phase(Enum):
    """What a step does. Generation knows `FORWARD` only; the others belong to a run."""

    FORWARD = 0
    BACKWARD = 1
    GRADIENT_NORMS = 2
    OPTIMIZER_STEP = 3
    EVALUATE = 4
    ENDS = 5


class Role(Enum):
    """What a tensor on the wire is. The list is closed: a token, a label or a logit has no place in it."""

    ACTIVATION = 0
    GRADIENT = 1
    MASK_COLUMNS = 2
    POSITIONS = 3
    SEGMENT_IDS = 4
    KEYS = 5
    VALUES = 6
    WEIGHT = 7
    NORMS = 8


class CodecId(Enum):
    """How a tensor's values are written down."""

    RAW = 0
    HALF = 1


AUTOCASTS = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Precision:
    """Three settings that never imply one another; each is a dtype's name ("float32", "bfloat16", "float16").

    `weights` is the trunk's dtype (and its KV cache's), `autocast` what matrix products run in
    (one of `AUTOCASTS`; "" is off), `wire` what activations are sent as.
    """

    weights: str = ""
    autocast: str = ""
    wire: str = ""


@dataclass(frozen=True, slots=True)
class StepKey:
    """Names one unit of work of one client, so that asked twice it is done once.

    Exactly one of `session` and `run` is not zero, except for a lone forward without a cache, where
    both are. `incarnation` counts the (re)openings: work of an older one is fenced off.
    """

    session: int = 0
    run: int = 0
    incarnation: int = 0
    step: int = 0
    microbatch: int = 0
    phase: Phase = Phase.FORWARD


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the server's share of a step went, in microseconds."""

    queued_us: int = 0
    device_us: int = 0
    copied_us: int = 0


@dataclass(frozen=True, slots=True)
class Versions:
    """Which adapter, at which version, answered; version 0 is the bare base model."""

    adapter: str = ""
    version: int = field(default=0)


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The part of PEFT's LoraConfig that may cross the wire; `r` of 0 is a trunk that is not trained."""

    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


SERVER_OPTIMIZERS = ("fedadam", "fedyogi")
"""The trunk's alone: no library has them for a whole model."""


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """torch's optimizer by the name that `TrainingArguments(optim=...)` has for it, and its constants.

    Or one of `SERVER_OPTIMIZERS` (Reddi et al. 2021); theirs are best with `beta2` 0.99 and `epsilon` 1e-3.

    The learning rate is that of the first step; each step may bring another one.
    """

    name: str = "adamw_torch_fused"
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    momentum: float = 0.0


@dataclass(frozen=True, slots=True)
class TapeSettings:
    """What the trunk keeps of a forward until its gradient comes back.

    `recompute` keeps the input alone and runs forward again; `checkpoint_every=n` keeps no inner
    results of every n-th layer and recomputes those (0: of none).
    """

    recompute: bool = False
    checkpoint_every: int = 0


PRIVATE = "private"


@dataclass(frozen=True, slots=True)
class CohortSettings:
    """Whose gradients make one optimizer step of a run together, and when that round is closed.

    `rule` is one of:
        "private": one client, each of its steps is the run's.
        "sync": all members; nobody goes on before the round is closed.
        "quorum": all members, or at least `quorum` of them once `timeout_s` have passed since the round's
            first gradient; who comes later is dropped, or with `carry_late` waits for the next round.
        "async": each member by itself, at once.
        "buffered": any `buffer` gradients; nobody waits (FedBuff, Nguyen et al. 2022).

    The first round waits for so many `members`; later ones for those that are there. A gradient whose
    forward is s versions old counts (1 + s) ** -staleness_exponent, and is refused above
    `staleness_limit` or after `age_limit_s` seconds (0 is no limit). `weighting` is what a member's mean
    gradient is weighted by: "tokens", "examples" or "equal". `clip_norm` is the 2-norm that the merged
    gradient of the trunk may have (0 does not clip).

    `aggregation` is how a round's gradients become one:
        "mean": weighted; any member can move it anywhere.
        "norm_clip": each member's clipped to the 2-norm `member_norm`, then the mean.
        "median", "trimmed_mean": of each coordinate the middle value, or the mean without the `byzantine`
            smallest and largest; each member has one vote.
        "krum": the one gradient with the most others near it, where up to `byzantine` members lie.
    A round waits for more members where too few have given for so many `byzantine` ones. `max_weight` is
    what a member's stated weight counts at most, `max_rate` the learning rate that a round has at most,
    whatever its members state (0 is no limit).
    """

    rule: str = PRIVATE
    members: int = 1
    quorum: int = 0
    timeout_s: float = 0.0
    carry_late: bool = False
    buffer: int = 0
    staleness_exponent: float = 0.5
    staleness_limit: int = 16
    age_limit_s: float = 0.0
    weighting: str = "tokens"
    clip_norm: float = 0.0
    aggregation: str = "mean"
    member_norm: float = 0.0
    byzantine: int = 0
    max_weight: float = 0.0
    max_rate: float = 0.0

    @property
    def is_private(self) -> bool:
        return self.rule == PRIVATE


PERSONAL, SYNC = "personal", "sync"
AVERAGING = ("fedavg", "ffa", "fedex")
SHARE_RULES = (PERSONAL, SYNC, *AVERAGING)


@dataclass(frozen=True, slots=True)
class ShareSettings:
    """What the members of a cohort share of their own bottoms and tops, besides the trunk.

    `rule` is one of:
        "personal": nothing; each member's ends are its own.
        "sync": they are trained as the trunk's is, by the run's optimizer, and all members have the same.
        "fedavg": the mean of their adapters, A and B each by itself (McMahan et al. 2017).
        "ffa": the same of B, while A is never trained (FFA-LoRA, Sun et al. 2024): nothing is lost.
        "fedex": the mean, and what it lacks of the mean of the products is added to the base
            (FedEx-LoRA, Singhal et al. 2024).

    The last three average every `every` optimizer steps of the run. `proximal` is FedProx's mu (Li et al.
    2020), which pulls a member's adapters towards the last average (0 does not).
    """

    rule: str = PERSONAL
    every: int = 1
    proximal: float = 0.0

    @property
    def is_personal(self) -> bool:
        return self.rule == PERSONAL

    @property
    def is_sync(self) -> bool:
        return self.rule == SYNC

    @property
    def averages(self) -> bool:
        return self.rule in AVERAGING


class Fate(Enum):
    """What became of the gradients that a member of a cohort gave."""

    MERGED = 1
    KEPT = 2
    DROPPED = 3


@dataclass(frozen=True, slots=True)
class Merged:
    """One member's gradients in one round: `staleness` counts versions, `members` gave to the round."""

    fate: Fate
    round: int = 0
    staleness: int = 0
    members: int = 0


@dataclass(frozen=True, slots=True)
class Averaged:
    """The ends of so many members became one.

    `aggregation_residual` is what the new ends lack of the mean of the members' products B A, as a part of
    that mean's norm.
    """

    number: int
    members: int
    aggregation_residual: float


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What a run is opened with; later members join what is there."""

    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    tape: TapeSettings = TapeSettings()
    precision: Precision = Precision()
    seed: int = 0
    accumulation: int = 1
    allow_download: bool = True
    cohort: CohortSettings = CohortSettings()
    share: ShareSettings = ShareSettings()
