"""Are N members of a synchronous cohort one client with the union of their batches? With a real model.

SmolLM2-135M in float32 over gRPC: LoRA on the trunk, bottom and top frozen, each member's rows of a length of
its own. The gradients of one step, and the trunk's update after ten AdamW steps, against the whole model with
the union batch; as a control the members weighted equally, which gives the mean of their means.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import markdown, serving, write
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from splitlearn import AutoSplitModelForCausalLM, CohortSettings
from splitlearn.cli.demo_model import bundled_model
from splitlearn.client.training import plan_run
from splitlearn.model.lora import ADAPTER, add_lora, settings_of, weights_of
from splitlearn.vocabulary import OptimizerSettings

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
CLIENTS, STEPS, ROWS, RATE = (2, 3, 5, 10), 10, 1, 1e-3
GRADIENT_WANTED, UPDATE_WANTED = 1e-5, 1e-3
ADAMW, SGD = OptimizerSettings(learning_rate=RATE), OptimizerSettings("sgd", learning_rate=1.0)
Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """Which model, on which server, and where the clients and the whole model compute."""

    folder: Path
    address: str
    device: str = "cpu"
    tokens: int = 40_000
    """Their ids are drawn below this."""

    def batch(self, member: int, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(1000 * member + step)
        return torch.randint(3, self.tokens, (ROWS, 9 + 7 * member), generator=draw).to(self.device)


@dataclass(frozen=True, slots=True)
class Found:
    """Relative 2-norms of differences: of one step's gradient and of the update after all steps."""

    clients: int
    gradient: float
    update: float
    update_of_equal_weights: float

    @property
    def is_good(self) -> bool:
        return (
            self.gradient <= GRADIENT_WANTED
            and self.update <= UPDATE_WANTED
            and self.update_of_equal_weights > UPDATE_WANTED
        )


def mean_loss(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    loss: Tensor = model(ids_BT, labels=ids_BT, use_cache=False).loss
    return loss


def tokens(ids_BT: Tensor) -> int:
    """Those that are predicted."""
    return ids_BT[:, 1:].numel()


# ---------------------------------------------------------------- the cohort


@contextmanager
def members(at: Place, run: str, weighting: str, count: int, how: OptimizerSettings) -> Iterator[list]:
    cohort = CohortSettings("sync", members=count, weighting=weighting)
    splits = []
    for number in range(count):
        split = AutoSplitModelForCausalLM.from_pretrained(
            at.folder,
            trunk=at.address,
            device=at.device,
            lora=LORA,
            run=run,
            freeze=["bottom", "top"],
            cohort=cohort,
            member=f"member-{number}",
            dtype=torch.float32,
        )
        plan_run(split.trunk, how)
        splits.append(split.train())
    try:
        yield splits
    finally:
        for split in splits:
            split.close()


def trained(at: Place, run: str, weighting: str, count: int, steps: int, how: OptimizerSettings) -> Weights:
    """How the trunk's weights moved."""
    with members(at, run, weighting, count, how) as splits:
        trunk = splits[0].trunk
        before = dict(trunk.transport.download_adapter(trunk.run.name).weights)

        def train(member: int) -> None:
            for step in range(steps):
                ids_BT = at.batch(member, step)
                mean_loss(splits[member], ids_BT).backward()
                weight = float(tokens(ids_BT)) if weighting == "tokens" else 1.0
                splits[member].trunk.step(learning_rate=how.learning_rate, weight=weight)

        with ThreadPoolExecutor(count) as threads:
            list(threads.map(train, range(count)))
        after = trunk.transport.download_adapter(trunk.run.name).weights
        for split in splits:
            split.trunk.leave()
        trunk.transport.delete_run(run)
    return {name: after[name] - weight for name, weight in before.items()}


# ---------------------------------------------------------------- the whole model


def whole_model(at: Place, names: Sequence[str]) -> tuple[PreTrainedModel, Weights]:
    """With the trunk's adapter alone to be trained."""
    whole = AutoModelForCausalLM.from_pretrained(at.folder, dtype=torch.float32).to(at.device)
    add_lora(whole, settings_of(LORA, whole.config.model_type), ADAPTER, seed=0)
    whole.requires_grad_(False)
    weights = {name: weight for name, weight in weights_of(whole, ADAPTER).items() if name in names}
    for weight in weights.values():
        weight.requires_grad_()
    return whole.train(), weights


def union_gradient(at: Place, whole: PreTrainedModel, count: int, step: int) -> None:
    batches = [at.batch(member, step) for member in range(count)]
    total = sum(map(tokens, batches))
    for ids_BT in batches:
        (mean_loss(whole, ids_BT) * (tokens(ids_BT) / total)).backward()


def gradient_alone(at: Place, names: Sequence[str], count: int) -> Weights:
    whole, weights = whole_model(at, names)
    union_gradient(at, whole, count, 0)
    return {name: weight.grad.cpu() for name, weight in weights.items() if weight.grad is not None}


def trained_alone(at: Place, names: Sequence[str], count: int) -> Weights:
    whole, weights = whole_model(at, names)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=0.0, fused=True)
    for step in range(STEPS):
        union_gradient(at, whole, count, step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: (weight.detach() - before[name]).cpu() for name, weight in weights.items()}


# ---------------------------------------------------------------- both


def off_by(ours: Weights, theirs: Weights) -> float:
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs])
    return float(apart.norm() / torch.cat([each.flatten() for each in theirs.values()]).norm())


def measure(at: Place, count: int) -> Found:
    gradient = {name: -each for name, each in trained(at, "sgd", "tokens", count, 1, SGD).items()}
    by_tokens, equally = (
        trained(at, weighting, weighting, count, STEPS, ADAMW) for weighting in ("tokens", "equal")
    )
    alone = trained_alone(at, list(gradient), count)
    return Found(
        count,
        off_by(gradient, gradient_alone(at, list(gradient), count)),
        off_by(by_tokens, alone),
        off_by(equally, alone),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found, folder = [], bundled_model()
    with tempfile.TemporaryDirectory() as state, serving(folder, "--state-dir", state) as server:
        for count in asked.clients:
            found.append(measure(Place(folder, server.address), count))
            print(found[-1], flush=True)
    header = (
        "members", f"gradient (wanted <= {GRADIENT_WANTED:g})",
        f"update after {STEPS} AdamW steps (wanted <= {UPDATE_WANTED:g})",
        f"update with equal weights (control, wanted > {UPDATE_WANTED:g})",
    )  # fmt: skip
    rows = [
        (each.clients, *(f"{d:.1e}" for d in (each.gradient, each.update, each.update_of_equal_weights)))
        for each in found
    ]
    figures = {each.clients: [each.gradient, each.update, each.update_of_equal_weights] for each in found}
    write(
        "cohort_parity",
        figures,
        f"{(__doc__ or '').split(chr(10), 2)[2].strip()}\n\n{markdown(header, rows)}",
    )
    if not all(each.is_good for each in found):
        sys.exit("a synchronous cohort is not one client with the union batch")


if __name__ == "__main__":
    main()
