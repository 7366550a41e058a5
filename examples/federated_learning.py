"""Clients with unlike texts train one adapter; one of them dies on the way, and comes back.

    python examples/federated_learning.py
    python examples/federated_learning.py --rule quorum --clients 4 --alpha 0.3
    python examples/federated_learning.py --bundled --data FILE.jsonl --by label

The first line takes a tiny random model, which ends in seconds; --bundled takes SmolLM2-135M-Instruct. The
texts are dealt out by a Dirichlet draw for each class, so that clients have unlike mixtures and unlike
numbers. Each client is a process. The first one is killed half way: the others go on, and it comes back under
its name with its key, after its last step that counted.
"""

import argparse
import multiprocessing
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from splitlearn import AutoSplitModelForCausalLM, CohortSettings, TrunkServer, held_out_loss
from splitlearn.cli.demo_model import bundled_model
from splitlearn.cli.demo_training import TEXT
from splitlearn.errors import ContributionLost, StaleGradient
from splitlearn.monitor.logs import log_to_stderr
from splitlearn.testing import lively_model
from splitlearn.training.classes import classes_by
from splitlearn.training.held_out import held_out
from splitlearn.training.lines import Completion, Line, read_lines
from splitlearn.training.partition import dirichlet

MAX_TOKENS, WAIT_S = 128, 600
PRELOADED = ["splitlearn", "splitlearn.testing", "transformers.models.llama"]


@dataclass(frozen=True)
class Member:
    """What a client's process is started with."""

    folder: Path
    address: str
    cohort: CohortSettings
    name: str
    key: Path
    texts: list[list[int]]
    steps: int
    learning_rate: float

    def join(self):
        return AutoSplitModelForCausalLM.from_pretrained(
            self.folder,
            trunk=self.address,
            dtype="float32",
            lora=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            freeze=("bottom", "top"),
            run="federation",
            cohort=self.cohort,
            member=self.name,
            member_key=self.key,
        )


def train(member: Member, told) -> None:
    """In a process of its own: the first time from step 1, after a death from where the trunk knows it."""
    torch.set_num_threads(1)
    model = member.join().train()
    first = model.trunk.run.step + 1
    for step in range(first, member.steps + 1):
        take_step(model, torch.tensor([member.texts[step % len(member.texts)]]), member.learning_rate)
        told.send((first, step))
    model.trunk.leave()
    model.close()


def take_step(model, ids: torch.Tensor, learning_rate: float) -> None:
    """Again where the trunk has lost it, or others have left its version behind."""
    while True:
        try:
            model(ids, labels=ids, use_cache=False).loss.backward()
            model.trunk.step(learning_rate=learning_rate, weight=float(ids[:, 1:].numel()))
            return
        except (ContributionLost, StaleGradient):
            continue


class Running:
    """A member's process, and how far it has told us it is."""

    def __init__(self, context, member: Member) -> None:
        self.member = member
        self._told, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=train, args=(member, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.first = self.step = 0

    def until(self, step: int) -> None:
        while self.step < step:
            if not self._told.poll(WAIT_S):
                raise SystemExit(f"{self.member.name} has said nothing for {WAIT_S} s")
            self.first, self.step = self._told.recv()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def join(self) -> None:
        self.until(self.member.steps)
        self._process.join(WAIT_S)


def federate(members: list[Member]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    running = [Running(context, member) for member in members]
    mortal = running[0]
    mortal.until(max(1, mortal.member.steps // 2))
    mortal.kill()
    print(f"{mortal.member.name} was killed after step {mortal.step}")
    running[0] = Running(context, mortal.member)
    for each in running:
        each.join()
    print(f"{mortal.member.name} came back at step {running[0].first}; all have done {mortal.member.steps}")


def read_texts(lines: list[Line], folder: Path) -> list[list[int]]:
    """The tiny model has no tokenizer and takes a byte as a token."""
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    encode = AutoTokenizer.from_pretrained(folder).encode if has_tokenizer else lambda text: [*text.encode()]
    examples = (line.example for line in lines)
    texts = (
        each.prompt + each.completion if isinstance(each, Completion) else each.text for each in examples
    )
    return [encode(text)[:MAX_TOKENS] for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model's folder; a tiny random one by default")
    parser.add_argument("--bundled", action="store_true", help="the bundled SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, default=TEXT, help=".jsonl; the demo's text by default")
    parser.add_argument("--by", default="length", help="the field that says a text's class, or length")
    parser.add_argument("--alpha", type=float, default=0.3, help="how alike the clients are")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--rule", choices=("buffered", "quorum"), default="buffered")
    parser.add_argument("--steps", type=int, default=8, help="of each client")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    asked = parser.parse_args()

    log_to_stderr()
    torch.set_num_threads(1)
    how = {"buffer": 2} if asked.rule == "buffered" else {"quorum": 2, "timeout_s": 1.0, "carry_late": True}
    # One more than train: who measures is a member, too, and gives nothing.
    cohort = CohortSettings(asked.rule, members=asked.clients + 1, **how)
    lines, measured = held_out(read_lines(asked.data), share=0.14, seed=0)
    classes = classes_by(asked.by, lines)
    parts = dirichlet(classes.of_example, asked.clients, asked.alpha, seed=0)

    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        folder = asked.model or (
            bundled_model() if asked.bundled else lively_model("llama", here / "tiny", vocab_size=256)
        )
        texts = read_texts(lines, folder)
        batches = [{"input_ids": torch.tensor([ids])} for ids in read_texts(measured, folder)]
        batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
        with TrunkServer(folder, port=0, state_dir=here / "state") as server:

            def member(name: str, held: list[int]) -> Member:
                key, own = here / "keys" / name, [texts[index] for index in held]
                return Member(
                    folder, server.address, cohort, name, key, own, asked.steps, asked.learning_rate
                )

            members = [member(f"client-{number}", held) for number, held in enumerate(parts, 1)]
            for each, held in zip(members, parts, strict=True):
                print(f"{each.name} has {len(held)} texts: {classes.counts(held)}")
            measuring = member("measuring", []).join()
            print(f"held-out loss before: {held_out_loss(measuring, batches):.4f}")
            measuring.trunk.leave()
            federate(members)
            print(f"held-out loss after:  {held_out_loss(measuring, batches):.4f}")
            measuring.close()


if __name__ == "__main__":
    main()
