"""A member's own bottom and top: given to the cohort's averages, and made what those say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitlearn.client.adapted import Adapted, adapted_ends
from splitlearn.client.member_run import MemberRun
from splitlearn.client.remote_trunk import RemoteTrunk
from splitlearn.errors import AdapterError, CheckpointError, SettingError
from splitlearn.model.lora import ADAPTER
from splitlearn.model.thin import Thin, accumulated
from splitlearn.vocabulary import Averaged, ShareSettings
from splitlearn.wire.messages import AveragedEnds, GivenEnds

A, B = ".lora_A.weight", ".lora_B.weight"
FFA = "ffa"
FILE, NOTE = "average.safetensors", "average"
UP, DOWN, TOWARDS = ".residual_up", ".residual_down", "towards/"


class OwnEnds:
    """As `share=` has it. The optimizer's state stays this member's own: averages change weights alone.

    Raises:
        SettingError: bottom and top have no adapter that is trained, or are trained in full.
        AdapterError: the adapter is of a kind that cannot be averaged.
    """

    def __init__(self, model: PreTrainedModel, trunk: RemoteTrunk, share: ShareSettings) -> None:
        self._trunk, self._share = trunk, share
        self._adapted = dict(adapted_ends(model, trunk))
        if not self._adapted:
            raise SettingError(f"share={share.rule!r} averages adapters of bottom and top: train one of them")
        if share.rule == FFA:
            for each in self._adapted.values():
                each.a.requires_grad_(False)
        self._number, self._due, self._weight = 0, share.every, 0.0
        self.residuals: dict[str, Thin] = {}
        """By module, what was added to its base, less the adapter's scale."""
        self._towards = self._copied()

    # ---------------------------------------------------------------- training

    @property
    def is_due(self) -> bool:
        """Whether the run has done so many steps that the members' ends are to be averaged."""
        run = self._run
        return run.version >= self._due and not run.is_repeating

    def count(self, weight: float) -> None:
        """A step counted, by so many tokens, examples or 1."""
        self._weight += weight

    @torch.no_grad()
    def pull(self) -> None:
        """FedProx: add mu x (w - the last average's w) to the gradients, before the client's optimizer steps.

        (Li et al. 2020.) Weights without a gradient, as of a step that was dropped, stay so.
        """
        if self._share.proximal:
            for name, weight in self._weights().items():
                if weight.grad is not None:
                    weight.grad.add_(weight - self._towards[name], alpha=self._share.proximal)

    def average(self) -> Averaged | None:
        """If it is due, wait for the other members, and become the average of all; None if it is not.

        Called after the client's optimizer has stepped, and once before the first step: whoever comes late
        is given the newest average.

        Raises:
            RoundUnfinished: others were waited for longer than `round_s`.
            AdapterError: the ends are not what the other members' are, or no finite numbers.
        """
        told = None
        # Whoever is behind gets the newest average first, and may be waited for in the next.
        while self.is_due:
            told = self._average()
        return told

    def _average(self) -> Averaged:
        weights = {name: weight.detach().cpu().clone() for name, weight in self._weights().items()}
        number = self._number + 1
        given = GivenEnds(number, self._counts(), self._frozen(), weights)
        average = self._run.average(given, since=self._number)
        self._become(average)
        self._trunk.last_average = Averaged(average.number, average.members, average.aggregation_residual)
        return self._trunk.last_average

    def _counts(self) -> float:
        is_equal = self._run.settings.cohort.weighting == "equal"
        return float(self._weight > 0) if is_equal else self._weight

    @torch.no_grad()
    def _become(self, average: AveragedEnds) -> None:
        ours = self._weights()
        told = {module: Thin(*factors) for module, factors in average.residual.items()}
        _require_fitting(average, told, ours, self._adapted)
        for name, weight in ours.items():
            weight.copy_(average.weights[name])
        before = {} if average.since_start else self.residuals
        self._set_residuals(
            before
            | {
                name: accumulated(before[name], each) if name in before else each
                for name, each in told.items()
            },
            told if not average.since_start else None,
        )
        self._number, self._due, self._weight = average.number, average.due, 0.0
        self._towards = self._copied()

    def _set_residuals(self, total: dict[str, Thin], change: Mapping[str, Thin] | None = None) -> None:
        """The bases with this total; `change`, where it is known, is what that is more than now."""
        for module, each in self._adapted.items():
            if change is not None:
                if module in change:
                    each.add_to_base(change[module].dense())
            elif module in total or module in self.residuals:
                each.add_to_base(_dense(total.get(module), each) - _dense(self.residuals.get(module), each))
        self.residuals = total

    # ---------------------------------------------------------------- on the disk

    def save(self, folder: Path) -> None:
        """What this member knows of its averages, beside its weights: what was added to the bases, too."""
        tensors = {TOWARDS + name: each.cpu() for name, each in self._towards.items()}
        for module, each in self.residuals.items():
            tensors[module + UP], tensors[module + DOWN] = each.up_OR, each.down_RI
        note = {"number": self._number, "due": self._due, "weight": self._weight}
        save_file(tensors, folder / FILE, {NOTE: json.dumps(note)})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Become what `save` wrote; weights are loaded before.

        Raises:
            CheckpointError: it is not there or torn, or of another model or rule.
        """
        try:
            with safe_open(folder / FILE, "pt") as file:
                note = json.loads(file.metadata()[NOTE])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            modules = [name.removesuffix(UP) for name in tensors if name.endswith(UP)]
            total = {each: Thin(tensors[each + UP], tensors[each + DOWN]) for each in modules}
            towards = {
                name.removeprefix(TOWARDS): each for name, each in tensors.items() if name.startswith(TOWARDS)
            }
            if towards.keys() != self._towards.keys() or not total.keys() <= self._adapted.keys():
                raise KeyError("other modules")
            self._set_residuals(total)
            self._towards = {name: each.to(self._towards[name].device) for name, each in towards.items()}
            self._number, self._due, self._weight = note["number"], note["due"], note["weight"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError):
            raise CheckpointError(
                f"{folder} has no readable {FILE} of this model: it was trained with another share= or "
                "lora=, or is torn"
            ) from None

    def folded(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """These, with what was added to the bases as further rank: [B U] [A; V] = B A + U V."""
        found = dict(weights)
        for module, each in self.residuals.items():
            found[module + B] = torch.cat([found[module + B], each.up_OR], dim=1)
            found[module + A] = torch.cat([found[module + A], each.down_RI])
        return found

    def fold(self, config: LoraConfig) -> None:
        """Say in PEFT's configuration which ranks that gives, at the scale that the modules have."""
        ranks, alphas = {}, {}
        for module, each in self.residuals.items():
            layer = self._adapted[module].layer
            rank = ranks[module] = layer.r[ADAPTER] + each.rank
            alphas[module] = layer.scaling[ADAPTER] * (math.sqrt(rank) if config.use_rslora else rank)
        # Of several names that fit PEFT takes the first.
        config.rank_pattern = ranks | dict(config.rank_pattern)
        config.alpha_pattern = alphas | dict(config.alpha_pattern)

    # ---------------------------------------------------------------- weights

    @property
    def _run(self) -> MemberRun:
        run = self._trunk.run
        assert isinstance(run, MemberRun)
        return run

    def _weights(self) -> dict[str, nn.Parameter]:
        """What is averaged: A and B of each module, or B alone."""
        named = {name + B: each.b for name, each in self._adapted.items()}
        if self._share.rule == FFA:
            return named
        return named | {name + A: each.a for name, each in self._adapted.items()}

    def _copied(self) -> dict[str, Tensor]:
        if not self._share.proximal:
            return {}
        return {name: weight.detach().clone() for name, weight in self._weights().items()}

    def _frozen(self) -> int:
        """A digest of what must be the same for all, since nobody trains it; 0 where that is nothing."""
        if self._share.rule != FFA:
            return 0
        found = xxhash.xxh3_64()
        for name, each in sorted(self._adapted.items()):
            found.update(name.encode())
            found.update(each.a.detach().cpu().contiguous().numpy().tobytes())
        return found.intdigest()


def _require_fitting(
    average: AveragedEnds,
    told: Mapping[str, Thin],
    ours: Mapping[str, Tensor],
    adapted: Mapping[str, Adapted],
) -> None:
    """Raises AdapterError where the server's average is not of this model."""
    tensors = [*average.weights.values(), *(factor for pair in average.residual.values() for factor in pair)]
    fits = {name: each.shape for name, each in average.weights.items()} == {
        name: each.shape for name, each in ours.items()
    } and all(
        module in adapted
        and each.up_OR.ndim == each.down_RI.ndim == 2
        and each.up_OR.shape == (len(adapted[module].b), each.rank)
        and each.down_RI.shape[1] == adapted[module].a.shape[1]
        for module, each in told.items()
    )
    if not fits or not all(bool(each.isfinite().all()) for each in tensors):
        raise AdapterError(
            f"average {average.number} does not fit this model: is it the same as the other members', with "
            "the same lora=?"
        )


def _dense(matrix: Thin | None, like: Adapted) -> Tensor:
    return torch.zeros(len(like.b), like.a.shape[1]) if matrix is None else matrix.dense()
