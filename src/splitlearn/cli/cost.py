"""What a split costs in memory and bytes, from the configuration and the tensors' headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from splitlearn.config import CodecName
from splitlearn.engine.kv_cache import LayerShape
from splitlearn.engine.runner import measure_layers
from splitlearn.errors import CheckpointError
from splitlearn.model.checkpoint import Checkpoint, Side
from splitlearn.model.families import causal_lm_class
from splitlearn.model.plan import SplitPlan
from splitlearn.model.segments import TrunkSegment, trunk_class
from splitlearn.model.weights import resolve_dtype

BOTH_WAYS = 2


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done: rows at once, tokens of a prompt or of a training row, new tokens."""

    batch: int
    seq: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class SideCost:
    """One side's layers and weights."""

    layers: int
    parameters: int
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class KvCost:
    """What the trunk keeps of a text; a session's rows take their slots whole, however short the text."""

    bytes_per_token: int
    session_tokens: int
    bytes_per_session: int


@dataclass(frozen=True, slots=True)
class WireCost:
    """Bytes of activations, both ways, for all rows; the messages around them are not counted."""

    bytes_per_token: int
    """Of one row."""
    prefill_bytes: int
    decode_step_bytes: int
    generation_bytes: int
    generation_bytes_without_cache: int
    training_step_bytes: int


@dataclass(frozen=True, slots=True)
class SplitCost:
    """All of it."""

    model_type: str
    split: str
    hidden_size: int
    dtype: str
    wire_dtype: str
    batched: bool
    batched_reason: str
    client: SideCost
    trunk: SideCost
    kv: KvCost
    wire: WireCost


def split_cost(
    checkpoint: Checkpoint,
    plan: SplitPlan,
    work: Work,
    session_tokens: int,
    dtype: str = "auto",
    codec: CodecName = "raw",
) -> SplitCost:
    """Nothing is loaded: shapes come from the headers, the KV cache's from a trunk without weights.

    Raises:
        CheckpointError: the folder is one side's slice, which cannot tell of the other side.
    """
    if checkpoint.note is not None:
        raise CheckpointError(f"{checkpoint.source} is a slice and holds one side only: plan the whole model")
    weights = resolve_dtype(dtype, checkpoint)
    wire = torch.bfloat16 if codec == "half" and weights == torch.float32 else weights
    held = None if dtype == "auto" else weights
    trunk = weightless_trunk(checkpoint, plan)
    return SplitCost(
        model_type=checkpoint.config.model_type,
        split=str(plan),
        hidden_size=trunk.hidden_size,
        dtype=str(weights).removeprefix("torch."),
        wire_dtype=str(wire).removeprefix("torch."),
        batched=trunk.batched,
        batched_reason=checkpoint.family.reason,
        client=side_cost(checkpoint, "client", plan, held),
        trunk=side_cost(checkpoint, "trunk", plan, held),
        kv=kv_cost(
            measure_layers(trunk), weights, work, min(session_tokens, trunk.max_positions or session_tokens)
        ),
        wire=wire_cost(trunk.hidden_size * wire.itemsize, work),
    )


def side_cost(checkpoint: Checkpoint, side: Side, plan: SplitPlan, held: torch.dtype | None) -> SideCost:
    """As the files hold it, or in another dtype."""
    entries = [entry for _, entry in checkpoint.entries(checkpoint.keys_of(side, plan)).values()]
    parameters = sum(math.prod(entry.shape) for entry in entries)
    stored = sum(entry.num_bytes for entry in entries)
    layers = len(plan.trunk) if side == "trunk" else len(plan.bottom) + len(plan.top)
    return SideCost(layers, parameters, parameters * held.itemsize if held else stored)


def weightless_trunk(checkpoint: Checkpoint, plan: SplitPlan) -> TrunkSegment:
    """The real trunk on the meta device: shapes without memory."""
    cut_class = trunk_class(causal_lm_class(checkpoint.config), plan)
    with torch.device("meta"):
        # On the meta device experts multiply in bfloat16 only.
        causal_lm = cut_class(checkpoint.config).to(torch.bfloat16)
    return TrunkSegment(causal_lm, plan, checkpoint.family).eval()


def kv_cost(shapes: list[LayerShape], dtype: torch.dtype, work: Work, session_tokens: int) -> KvCost:
    token = sum(shape.elements for shape in shapes) * dtype.itemsize
    return KvCost(token, session_tokens, token * session_tokens * work.batch)


def wire_cost(activation_bytes: int, work: Work) -> WireCost:
    """`activation_bytes` is one token's activation at one cut."""
    token = BOTH_WAYS * activation_bytes
    return WireCost(
        bytes_per_token=token,
        prefill_bytes=token * work.batch * work.seq,
        decode_step_bytes=token * work.batch,
        generation_bytes=token * work.batch * tokens_with_cache(work.seq, work.new_tokens),
        generation_bytes_without_cache=token * work.batch * tokens_without_cache(work.seq, work.new_tokens),
        # Activation and gradient at each of the two cuts.
        training_step_bytes=2 * token * work.batch * work.seq,
    )


def tokens_with_cache(prompt: int, new: int) -> int:
    """Every token goes to the trunk once; the last new one never does."""
    return prompt + new - 1


def tokens_without_cache(prompt: int, new: int) -> int:
    """Every step sends the whole text again."""
    return sum(prompt + made for made in range(new))
