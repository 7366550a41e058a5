"""`splitlearn doctor`: whether this machine can load, reach and run it; each check a line with its mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from splitlearn.cli.checks import Check, failed, ok, print_checks, skipped, warning
from splitlearn.cli.ending import FAILED
from splitlearn.cli.machine import free_memory_bytes, installed, wanted
from splitlearn.cli.options import BOTTOM_LAYERS, TOP_LAYERS, parse_address
from splitlearn.cli.sizes import show_bytes
from splitlearn.config import ClientConfig
from splitlearn.errors import SplitLearnError

if TYPE_CHECKING:
    from splitlearn.model.checkpoint import Checkpoint
    from splitlearn.wire.messages import TrunkFacts

OLDEST_PYTHON = (3, 11)
PACKAGES = ("torch", "transformers", "safetensors", "grpcio", "protobuf", "pydantic")
LITTLE_MEMORY = 2_000_000_000
"""What python, torch and transformers take before any model."""


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub id of the model to look at.")
    ] = None,
    trunk: Annotated[
        str | None,
        typer.Option(parser=parse_address, metavar="HOST:PORT", help="The trunk server to look at."),
    ] = None,
) -> None:
    """Can this machine load, reach and run it?

    Each check is a line, with what to do where it is not ok.
    """
    if not print_checks(all_checks(model, trunk)):
        raise typer.Exit(FAILED)


def all_checks(model: str | None, trunk: str | None) -> Iterator[Check]:
    yield check_python()
    yield from map(check_package, PACKAGES)
    yield check_threads(trunk)
    yield check_gpu()
    checkpoint, check = check_model(model)
    yield check
    yield check_memory(checkpoint)
    facts, check = check_trunk(trunk)
    yield check
    yield check_same_model(checkpoint, facts)


def check_python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        return failed("python", found, "install 3.11 or newer")
    return ok("python", found)


def check_package(package: str) -> Check:
    requirement, found = wanted(package), installed(package)
    if found is None:
        return failed(package, "not installed", f'pip install "{requirement}"')
    if not requirement.specifier.contains(found, prereleases=True):
        return failed(
            package, f"{found}, supported is {requirement.specifier}", f'pip install "{requirement}"'
        )
    return ok(package, found)


def check_threads(trunk: str | None) -> Check:
    """Two processes that each take all cores slow each other down severalfold."""
    import torch

    found = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    here = trunk is not None and trunk.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")
    if here and "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > 1:
        return warning(
            "threads",
            f"{found}, and the trunk is on this machine too",
            "set OMP_NUM_THREADS=1 for each process",
        )
    return ok("threads", found)


def check_gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return ok("gpu", "none that torch can use: what runs here runs on the CPU")
    free, total = torch.cuda.mem_get_info()
    return ok("gpu", f"{torch.cuda.get_device_name()}, {show_bytes(free)} of {show_bytes(total)} free")


def check_model(model: str | None) -> tuple[Checkpoint | None, Check]:
    from splitlearn.model.checkpoint import Checkpoint

    if model is None:
        return None, skipped("model", "none named: splitlearn doctor MODEL")
    try:
        checkpoint = Checkpoint.open(model)
    except SplitLearnError as error:
        return None, failed("model", error.message)
    family, config = checkpoint.family, checkpoint.config
    way = "sessions run in one batch" if family.batched else f"sessions run one by one ({family.reason})"
    return checkpoint, ok("model", f"{family.model_type}, {config.num_hidden_layers} layers, {way}")


def check_memory(checkpoint: Checkpoint | None) -> Check:
    free = free_memory_bytes()
    if free is None:
        return skipped("memory", "this system does not say how much is free")
    needed = LITTLE_MEMORY + (_client_bytes(checkpoint) if checkpoint else 0)
    found = f"{show_bytes(free)} free, a client takes about {show_bytes(needed)}"
    if free < needed:
        return failed("memory", found, "end other programs, or give the client fewer layers")
    return ok("memory", found)


def check_trunk(address: str | None) -> tuple[TrunkFacts | None, Check]:
    from splitlearn.client.grpc_transport import describe

    if address is None:
        return None, skipped("trunk", "none named: --trunk HOST:PORT")
    try:
        facts = describe(address, ClientConfig().connect_s)
    except SplitLearnError as error:
        return None, failed("trunk", error.message)
    found = f"{facts.software}, {_described(facts)}"
    if facts.draining:
        return facts, failed("trunk", f"stopping; {found}", "wait until it is back, or take another")
    return facts, ok("trunk", found)


def check_same_model(checkpoint: Checkpoint | None, facts: TrunkFacts | None) -> Check:
    from splitlearn.model.plan import SplitPlan
    from splitlearn.model.weights import fingerprint
    from splitlearn.wire.handshake import PROTOCOL, ModelIdentity, require_same_model

    if checkpoint is None or facts is None:
        return skipped("same model", "needs a MODEL that opens and a --trunk that answers")
    if facts.protocol != PROTOCOL:
        return failed(
            "same model",
            f"the trunk speaks protocol {facts.protocol}, this is {PROTOCOL}",
            "install one version",
        )
    sizes = (facts.bottom_layers, facts.trunk_layers, facts.top_layers)
    theirs = ModelIdentity(facts.config_hash, facts.weights_hash, *sizes)
    try:
        plan = SplitPlan.for_config(checkpoint.config, facts.bottom_layers, facts.top_layers, True)
        ours = fingerprint(checkpoint, plan)
        require_same_model(
            ours=theirs,
            theirs=ModelIdentity.of(ours.config_hash, ours.weights_hash, sizes[0], len(plan.trunk), sizes[2]),
        )
    except SplitLearnError as error:
        return failed("same model", error.message)
    return ok("same model", f"configuration and sampled weights agree, split {plan}")


def _client_bytes(checkpoint: Checkpoint) -> int:
    """Bottom and top at the default cut, or all that the slice holds."""
    from splitlearn.model.plan import SplitPlan

    try:
        plan = (
            checkpoint.note.plan
            if checkpoint.note
            else SplitPlan.for_config(checkpoint.config, BOTTOM_LAYERS, TOP_LAYERS)
        )
    except SplitLearnError:
        return 0
    entries = checkpoint.entries(checkpoint.keys_of("client", plan))
    return sum(entry.num_bytes for _, entry in entries.values())


def _described(facts: TrunkFacts) -> str:
    way = "sessions in one batch" if facts.batched else f"sessions one by one ({facts.batched_reason})"
    return (
        f"protocol {facts.protocol}, {facts.model_type} cut "
        f"{facts.bottom_layers}/{facts.trunk_layers}/{facts.top_layers}, {facts.precision.weights} on "
        f"{facts.device}, {facts.attention} attention, {way}, {facts.sessions} open, KV budget "
        f"{show_bytes(facts.kv_bytes_free)} of {show_bytes(facts.kv_bytes_total)} free"
    )
