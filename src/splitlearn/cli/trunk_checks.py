"""Whether the model opens, the trunk answers, and both are one model."""

from __future__ import annotations

from splitlearn.cli.checks import Check, failed, ok, skipped
from splitlearn.cli.sizes import show_bytes
from splitlearn.client.calls import describe
from splitlearn.config import ClientConfig
from splitlearn.errors import SplitLearnError
from splitlearn.model.checkpoint import Checkpoint
from splitlearn.model.plan import SplitPlan
from splitlearn.model.weights import fingerprint
from splitlearn.wire.handshake import PROTOCOL, ModelIdentity, require_same_model
from splitlearn.wire.messages import TrunkFacts


def check_model(model: str | None) -> tuple[Checkpoint | None, Check]:
    if model is None:
        return None, skipped("model", "none named: splitlearn doctor MODEL")
    try:
        checkpoint = Checkpoint.open(model)
    except SplitLearnError as error:
        return None, failed("model", error.message)
    family, layers = checkpoint.family, checkpoint.config.num_hidden_layers
    way = _way(family.batched, family.reason)
    return checkpoint, ok("model", f"{family.model_type}, {layers} layers, {way}")


def check_trunk(address: str | None) -> tuple[TrunkFacts | None, Check]:
    if address is None:
        return None, skipped("trunk", "none named: --trunk HOST:PORT")
    try:
        facts = describe(address, ClientConfig().connect_s)
    except SplitLearnError as error:
        return None, failed("trunk", error.message)
    found = f"{facts.software}, {described(facts)}"
    if facts.draining:
        return facts, failed("trunk", f"stopping; {found}", "wait until it is back, or take another")
    return facts, ok("trunk", found)


def check_same_model(checkpoint: Checkpoint | None, facts: TrunkFacts | None) -> Check:
    if checkpoint is None or facts is None:
        return skipped("same model", "needs a MODEL that opens and a --trunk that answers")
    if facts.protocol != PROTOCOL:
        found = f"the trunk speaks protocol {facts.protocol}, this is {PROTOCOL}"
        return failed("same model", found, "install the same version of splitlearn on both sides")
    try:
        plan = SplitPlan.for_config(
            checkpoint.config, facts.bottom_layers, facts.top_layers, accept_label_leak=True
        )
        require_same_model(ours=_theirs(facts), theirs=_ours(checkpoint, plan))
    except SplitLearnError as error:
        return failed("same model", error.message)
    return ok("same model", f"configuration and sampled weights agree, split {plan}")


def described(facts: TrunkFacts) -> str:
    """A trunk in one line."""
    because = f" ({facts.attention_reason})" if facts.attention_reason else ""
    return (
        f"protocol {facts.protocol}, {facts.model_type} cut "
        f"{facts.bottom_layers}/{facts.trunk_layers}/{facts.top_layers}, {facts.precision.weights} on "
        f"{facts.device}, {facts.attention} attention{because}, {_way(facts.batched, facts.batched_reason)}, "
        f"{facts.sessions} open, {show_bytes(facts.kv_bytes_free)} of its KV budget of "
        f"{show_bytes(facts.kv_bytes_total)} free"
    )


def _ours(checkpoint: Checkpoint, plan: SplitPlan) -> ModelIdentity:
    ours = fingerprint(checkpoint, plan)
    sizes = (len(plan.bottom), len(plan.trunk), len(plan.top))
    return ModelIdentity.of(ours.config_hash, ours.weights_hash, *sizes)


def _theirs(facts: TrunkFacts) -> ModelIdentity:
    sizes = (facts.bottom_layers, facts.trunk_layers, facts.top_layers)
    return ModelIdentity(facts.config_hash, facts.weights_hash, *sizes)


def _way(batched: bool, reason: str) -> str:
    return "sessions in one batch" if batched else f"sessions one by one ({reason})"
