"""Runs as protobuf, both ways: what a run is opened with, and where it stands."""

from __future__ import annotations

import math
import re

from splitlearn.errors import MessageError
from splitlearn.vocabulary import (
    CohortSettings,
    LoraSettings,
    OptimizerSettings,
    RunSettings,
    ShareSettings,
    TapeSettings,
)
from splitlearn.wire.generated import splitlearn_pb2 as pb
from splitlearn.wire.merged import merged_from_proto, merged_to_proto
from splitlearn.wire.messages import MemberFacts, OpenRun, RunFacts
from splitlearn.wire.precision import precision_from_proto, precision_to_proto

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
MAX_TARGETS = 256
MAX_ACCUMULATION = 1 << 16


def open_run_to_proto(open: OpenRun, client: bytes) -> pb.OpenRunRequest:
    settings = open.settings
    return pb.OpenRunRequest(
        name=open.name,
        client=client,
        lora=lora_to_proto(settings.lora),
        optimizer=optimizer_to_proto(settings.optimizer),
        tape=pb.TapeSettings(
            recompute=settings.tape.recompute, checkpoint_every=settings.tape.checkpoint_every
        ),
        precision=precision_to_proto(settings.precision),
        seed=settings.seed,
        accumulation=settings.accumulation,
        allow_download=settings.allow_download,
        start_from=open.start_from,
        cohort=cohort_to_proto(settings.cohort),
        share=share_to_proto(settings.share),
        member=open.member,
    )


def open_run_from_proto(proto: pb.OpenRunRequest) -> OpenRun:
    """Raises MessageError for what no run is opened with."""
    if not 1 <= proto.accumulation <= MAX_ACCUMULATION:
        raise MessageError(
            f"accumulation is {proto.accumulation}: it must lie between 1 and {MAX_ACCUMULATION:,}"
        )
    return OpenRun(
        name=run_name(proto.name),
        settings=RunSettings(
            lora=lora_from_proto(proto.lora),
            optimizer=optimizer_from_proto(proto.optimizer),
            tape=TapeSettings(proto.tape.recompute, proto.tape.checkpoint_every),
            precision=precision_from_proto(proto.precision),
            seed=proto.seed,
            accumulation=proto.accumulation,
            allow_download=proto.allow_download,
            cohort=cohort_from_proto(proto.cohort),
            share=share_from_proto(proto.share),
        ),
        start_from=proto.start_from,
        member=member_name(proto.member),
    )


def run_name(name: str) -> str:
    """The name, which is also a folder's on the server.

    Raises:
        MessageError: it has characters that no folder should have.
    """
    if not RUN_NAME.fullmatch(name):
        raise MessageError(
            f"{name[:80]!r} is no name for a run: letters, digits, - _ and . (not at the start), at most 64"
        )
    return name


def member_name(name: str) -> str:
    """What a member of a cohort is called; empty where there is none.

    Raises:
        MessageError: it has characters that no name should have.
    """
    if name and not RUN_NAME.fullmatch(name):
        raise MessageError(
            f"{name[:80]!r} is no member's name: letters, digits, - _ and . (not at the start), at most 64"
        )
    return name


def facts_to_proto(facts: RunFacts) -> pb.RunReply:
    return pb.RunReply(
        name=facts.name,
        run=facts.number,
        state=facts.state,
        step=facts.step,
        version=facts.version,
        incarnation=facts.incarnation,
        checkpoints=facts.checkpoints,
        checkpoint_digests=facts.digests,
        lora=lora_to_proto(facts.settings.lora),
        optimizer=optimizer_to_proto(facts.settings.optimizer),
        bytes_on_disk=facts.bytes_on_disk,
        precision=precision_to_proto(facts.settings.precision),
        seed=facts.settings.seed,
        allow_download=facts.settings.allow_download,
        cohort=cohort_to_proto(facts.settings.cohort),
        share=share_to_proto(facts.settings.share),
        members=map(_member_to_proto, facts.members),
        member=facts.member,
        active_members=facts.active_members,
        known_members=facts.known_members,
    )


def facts_from_proto(proto: pb.RunReply) -> RunFacts:
    return RunFacts(
        name=proto.name,
        number=proto.run,
        incarnation=proto.incarnation,
        state=proto.state,
        step=proto.step,
        version=proto.version,
        settings=RunSettings(
            lora=lora_from_proto(proto.lora),
            optimizer=optimizer_from_proto(proto.optimizer),
            precision=precision_from_proto(proto.precision),
            seed=proto.seed,
            allow_download=proto.allow_download,
            cohort=cohort_from_proto(proto.cohort),
            share=share_from_proto(proto.share),
        ),
        checkpoints=tuple(proto.checkpoints),
        bytes_on_disk=proto.bytes_on_disk,
        digests=tuple(proto.checkpoint_digests),
        members=tuple(map(_member_from_proto, proto.members)),
        member=proto.member,
        active_members=proto.active_members,
        known_members=proto.known_members,
    )


def _member_to_proto(member: MemberFacts) -> pb.Member:
    return pb.Member(
        name=member.name,
        state=member.state,
        incarnation=member.incarnation,
        last_step=member.step,
        lease_left_s=member.lease_left_s,
        last=None if member.last is None else merged_to_proto(member.last),
        version=member.version,
    )


def _member_from_proto(proto: pb.Member) -> MemberFacts:
    return MemberFacts(
        name=proto.name,
        state=proto.state,
        incarnation=proto.incarnation,
        step=proto.last_step,
        lease_left_s=proto.lease_left_s,
        last=merged_from_proto(proto.last) if proto.HasField("last") else None,
        version=proto.version if proto.HasField("version") else None,
    )


def lora_to_proto(lora: LoraSettings) -> pb.LoraSettings:
    return pb.LoraSettings(
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=lora.exclude_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
    )


def lora_from_proto(proto: pb.LoraSettings) -> LoraSettings:
    lists = (proto.target_modules, proto.exclude_modules, proto.rank_pattern, proto.alpha_pattern)
    if any(len(each) > MAX_TARGETS for each in lists):
        raise MessageError(f"LoRA settings with more than {MAX_TARGETS} names in a list")
    return LoraSettings(
        r=proto.r,
        alpha=proto.alpha,
        dropout=proto.dropout,
        target_modules=tuple(proto.target_modules),
        exclude_modules=tuple(proto.exclude_modules),
        use_rslora=proto.use_rslora,
        use_dora=proto.use_dora,
        rank_pattern=dict(proto.rank_pattern),
        alpha_pattern=dict(proto.alpha_pattern),
    )


def optimizer_to_proto(optimizer: OptimizerSettings) -> pb.OptimizerSettings:
    return pb.OptimizerSettings(
        name=optimizer.name,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
        momentum=optimizer.momentum,
    )


def optimizer_from_proto(proto: pb.OptimizerSettings) -> OptimizerSettings:
    settings = OptimizerSettings(
        name=proto.name,
        learning_rate=proto.learning_rate,
        weight_decay=proto.weight_decay,
        beta1=proto.beta1,
        beta2=proto.beta2,
        epsilon=proto.epsilon,
        momentum=proto.momentum,
    )
    figures = (
        settings.learning_rate,
        settings.weight_decay,
        settings.beta1,
        settings.beta2,
        settings.epsilon,
        settings.momentum,
    )
    if not all(math.isfinite(figure) and figure >= 0 for figure in figures):
        raise MessageError("an optimizer's settings are finite numbers, none of them below 0")
    return settings


def cohort_to_proto(cohort: CohortSettings) -> pb.CohortSettings:
    return pb.CohortSettings(
        rule=cohort.rule,
        members=cohort.members,
        quorum=cohort.quorum,
        timeout_s=cohort.timeout_s,
        carry_late=cohort.carry_late,
        buffer=cohort.buffer,
        staleness_exponent=cohort.staleness_exponent,
        staleness_limit=cohort.staleness_limit,
        age_limit_s=cohort.age_limit_s,
        weighting=cohort.weighting,
        clip_norm=cohort.clip_norm,
        aggregation=cohort.aggregation,
        member_norm=cohort.member_norm,
        byzantine=cohort.byzantine,
        max_weight=cohort.max_weight,
        max_rate=cohort.max_rate,
    )


def cohort_from_proto(proto: pb.CohortSettings) -> CohortSettings:
    """Without a rule it is a private run's; which rules there are, the engine knows.

    Raises:
        MessageError: a figure is none.
    """
    if not proto.rule:
        return CohortSettings()
    figures = (
        proto.timeout_s,
        proto.staleness_exponent,
        proto.age_limit_s,
        proto.clip_norm,
        proto.member_norm,
        proto.max_weight,
        proto.max_rate,
    )
    if not all(math.isfinite(figure) and figure >= 0 for figure in figures):
        raise MessageError("a cohort's settings are finite numbers, none of them below 0")
    return CohortSettings(
        rule=proto.rule,
        members=proto.members,
        quorum=proto.quorum,
        timeout_s=proto.timeout_s,
        carry_late=proto.carry_late,
        buffer=proto.buffer,
        staleness_exponent=proto.staleness_exponent,
        staleness_limit=proto.staleness_limit,
        age_limit_s=proto.age_limit_s,
        weighting=proto.weighting,
        clip_norm=proto.clip_norm,
        aggregation=proto.aggregation or "mean",
        member_norm=proto.member_norm,
        byzantine=proto.byzantine,
        max_weight=proto.max_weight,
        max_rate=proto.max_rate,
    )


def share_to_proto(share: ShareSettings) -> pb.ShareSettings:
    return pb.ShareSettings(rule=share.rule, every=share.every, proximal=share.proximal)


def share_from_proto(proto: pb.ShareSettings) -> ShareSettings:
    """Without a rule nothing is shared; whether it makes sense is asked where it is used."""
    return ShareSettings(proto.rule, proto.every, proto.proximal) if proto.rule else ShareSettings()
