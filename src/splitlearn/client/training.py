"""Making a client's model ready to be trained: LoRA on bottom and top, and a run planned on the trunk."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from transformers import PreTrainedModel

from splitlearn.client.adapter_files import lora_of, start_from
from splitlearn.client.ends import OwnEnds
from splitlearn.client.parts import (
    ENDS,
    parameters_around,
    require_parts,
    train_parts,
    trunk_of,
    units_in_full,
)
from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.client.run import require_same
from splitlearn.client.shared_ends import SharedEnds
from splitlearn.client.trunk_operation import NO_RUN
from splitlearn.errors import AdapterError, SettingError, UnsupportedCall
from splitlearn.model.lora import ADAPTER, add_lora, settings_of, weights_of
from splitlearn.model.skeleton import decoder_of
from splitlearn.vocabulary import (
    PERSONAL,
    CohortSettings,
    LoraSettings,
    OptimizerSettings,
    Precision,
    RunSettings,
    ShareSettings,
    TapeSettings,
)
from splitlearn.wire.messages import OpenRun
from splitlearn.wire.share import require_sensible

NOT_TRAINED = LoraSettings(r=0)
CLIP_EPSILON = 1e-6


def prepare_training(
    model: PreTrainedModel,
    lora: LoraConfig | str | Path | None,
    run: str | None,
    freeze: Collection[str],
    seed: int,
    tape: TapeSettings | None = None,
    *,
    full: Collection[str] = (),
    allow_download: bool = True,
) -> None:
    """Put LoRA on bottom and top, and plan the trunk's run; without `lora` and `freeze` nothing is done.

    `lora` is PEFT's configuration, or the folder of an adapter to go on from. The other arguments are
    those of `AutoSplitModelForCausalLM.from_pretrained`.

    Raises:
        SettingError: `freeze` or `full` names no part, or they leave nothing to train.
        AdapterError: the LoRA settings cannot be used.
    """
    require_parts(freeze, full)
    folder = None if lora is None or isinstance(lora, LoraConfig) else Path(lora)
    if folder is not None:
        lora = lora_of(folder)
    if lora is None:
        if "trunk" not in freeze:
            if freeze or full or run is not None or folder is not None:
                raise SettingError(
                    "give lora=LoraConfig(...) to train the trunk, or freeze=['trunk'] to leave it be"
                )
            return
        full = _all_in_full(freeze, full)
    adapter = NOT_TRAINED
    if isinstance(lora, LoraConfig):
        adapter = settings_of(lora, model.config.model_type)
        add_lora(model, adapter, ADAPTER, seed)
        model._hf_peft_config_loaded = True  # what transformers' own add_adapter notes
        _require_writable(model, freeze, full)
    trunk = trunk_of(model)
    train_parts(model, trunk, freeze, full)
    # Said now, and not after hours of training.
    units_in_full(model, trunk)
    trunk.lora = adapter
    asked = NOT_TRAINED if "trunk" in freeze else adapter
    name = run or f"run-{secrets.token_hex(8)}"
    settings = RunSettings(lora=asked, tape=tape or TapeSettings(), seed=seed, allow_download=allow_download)
    trunk.planned, trunk.is_named = OpenRun(name, settings), run is not None
    if folder is not None:
        start_from(model, trunk, folder)


def share_run(
    model: PreTrainedModel,
    cohort: CohortSettings | None,
    member: str | None,
    share: str | ShareSettings = PERSONAL,
) -> None:
    """Plan the run as one that a cohort trains; without `cohort` nothing is done.

    Raises:
        SettingError: there is no run to share, the cohort is not known by name, or `share` makes no sense;
            or bottom and top have no adapters to share.
        AdapterError: the adapter is of a kind that `share` cannot average.
    """
    trunk = trunk_of(model)
    share = ShareSettings(share) if isinstance(share, str) else share
    require_sensible(share, cohort or CohortSettings())
    if cohort is None or cohort.is_private:
        if member is not None:
            raise SettingError("give cohort=CohortSettings(...) with member=: a private run has no members")
        return
    if trunk.planned is None or not trunk.is_named:
        raise SettingError("a cohort trains a run that all its members name: give lora= and run='...'")
    settings = replace(trunk.planned.settings, cohort=cohort, share=share)
    name = member or f"member-{secrets.token_hex(4)}"
    trunk.planned = replace(trunk.planned, settings=settings, member=name)
    trunk.own_ends = OwnEnds(model, trunk, share) if share.averages else None
    if share.is_sync and trunk.ends is None:
        trunk.ends = SharedEnds(_ends_to_share(model, trunk))
        # Before the bottom computes anything, and before what listens to the call.
        decoder_of(model).register_forward_pre_hook(lambda *_: trunk.refresh_ends(), prepend=True)


def _ends_to_share(model: PreTrainedModel, trunk: RemoteTrunk) -> dict[str, nn.Parameter]:
    """The adapters of bottom and top that are trained.

    Raises:
        SettingError: a part is trained in full, or neither has an adapter that is trained.
    """
    if whole := units_in_full(model, trunk):
        raise SettingError(
            f"share='sync' is for adapters, {min(whole)} is trained in full: leave full= out, or share"
        )
    ends = {name: weight for name, weight in weights_of(model, ADAPTER).items() if weight.requires_grad}
    if not ends:
        raise SettingError(
            "share='sync' shares the adapters of bottom and top, and both are frozen: leave one of them out "
            "of freeze=, or leave share out"
        )
    return ends


def _require_writable(model: PreTrainedModel, freeze: Collection[str], full: Collection[str]) -> None:
    """PEFT's file says which layers have an adapter, but adapters of experts' fused weights are in all.

    Raises:
        AdapterError: some layers are to have none, and the experts are targets.
    """
    config = model.peft_config[ADAPTER]
    if config.target_parameters and (full or "trunk" in freeze):
        reached = ", ".join(sorted(config.target_parameters))
        raise AdapterError(
            f"the adapter's targets reach experts ({reached}), whose adapters PEFT loads into all layers or "
            "none, not beside parts in full or a frozen trunk: name other modules, for example "
            "target_modules=['q_proj', 'v_proj']"
        )


def _all_in_full(freeze: Collection[str], full: Collection[str]) -> Collection[str]:
    """Without LoRA what is not frozen is trained in full; who names some of it must have meant all."""
    rest = [part for part in ENDS if part not in freeze]
    if full and set(full) != set(rest):
        raise SettingError(
            f"without lora= full={sorted(full)} says nothing of {', '.join(sorted(set(rest) - set(full)))}: "
            "name it in full or in freeze"
        )
    return rest


def clip_grad_norm(model: nn.Module, max_norm: float, trunk_norms: Tensor | None = None) -> Tensor:
    """Clip the gradients of bottom, trunk and top by their common norm, as torch does on a whole model.

    The trunk's norms come over the wire one a weight and take their places among the client's, so
    that the sum is taken in the whole model's order: the result is torch's, bit for bit. The trunk
    scales its gradients with its next optimizer step.

    Args:
        model: a split model, wrapped or not.
        max_norm: the 2-norm that the gradients may have together.
        trunk_norms: what `model.trunk.grad_norms()` gave, where it has been asked already.

    In a cohort the trunk's gradients are clipped with the others' (`CohortSettings.clip_norm`), and here
    bottom and top by their own norm; where the cohort trains them, too, all three are clipped there.

    Returns:
        Their norm before (a scalar); not finite where one of them is not.
    """
    trunk = trunk_of(model)
    below, above = (
        [each.grad for each in side if each.grad is not None] for side in parameters_around(model, trunk)
    )
    device = next((gradient.device for gradient in (*below, *above)), torch.device("cpu"))
    is_whole = not trunk.is_shared or trunk.ends is not None
    between = trunk.grad_norms() if trunk_norms is None and is_whole else trunk_norms
    if between is None or not is_whole:
        between = torch.empty(0)
    # What an earlier clipping left of them; the trunk scales its gradients when it steps.
    between = (between[between != -1] * trunk.gradient_scale).to(device)
    norms = [*_norms(below), *between.unbind(), *_norms(above)]
    if not norms:
        return torch.zeros(())
    # The trunk's gradients are float32, as its norms are.
    norms = [norms[index] for index in _torchs_order([*below, *between.unbind(), *above])]
    total = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))
    if trunk.ends is not None:
        return total
    scale = torch.clamp(max_norm / (total + CLIP_EPSILON), max=1.0)
    for gradient in (*below, *above):
        gradient.mul_(scale.to(gradient.device))
    if not trunk.is_shared:
        trunk.gradient_scale *= float(scale)
    return total


def _torchs_order(gradients: list[Tensor]) -> list[int]:
    """torch takes norms by precision: half-precision weights in full stand beside a float32 adapter."""
    groups = _group_tensors_by_device_and_dtype([gradients], with_indices=True)  # type: ignore[list-item]
    return [index for _, indices in groups.values() for index in indices]


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_norm(gradients, 2.0)) if gradients else []


def plan_run(
    trunk: RemoteTrunk, optimizer: OptimizerSettings, accumulation: int = 1, autocast: str = ""
) -> None:
    """Say what the run is opened with; of an open one, only the accumulation can still change.

    Raises:
        UnsupportedCall: the model was loaded without `lora=`.
        SettingError: the run is open already, with another optimizer or precision.
    """
    if trunk.planned is None:
        raise UnsupportedCall(NO_RUN)
    settings = replace(
        trunk.planned.settings,
        optimizer=optimizer,
        accumulation=accumulation,
        precision=Precision(autocast=autocast),
    )
    if trunk.is_training and not trunk.reopen_if_unused():
        require_same(trunk.run.name, trunk.run.settings, settings)
        trunk.run.accumulation = accumulation
    trunk.planned = replace(trunk.planned, settings=settings)
