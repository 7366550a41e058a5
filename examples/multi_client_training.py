"""Several clients train one adapter on one trunk: who was in which round, and what came of it.

    python examples/multi_client_training.py
    python examples/multi_client_training.py --bundled --clients 3 --rule async --steps 8
    python examples/multi_client_training.py --model DIR --trunk HOST:PORT --data FILE.jsonl --output adapter

The first line takes a tiny random model, which ends in seconds; --bundled takes SmolLM2-135M-Instruct. Each
client is a thread with a model, a connection and texts of its own. Bottom and top are frozen, so that the
trunk's adapter is all that is learned, and any client can write it.
"""

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
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
from splitlearn.training.held_out import held_out
from splitlearn.training.lines import Completion, read_lines
from splitlearn.training.partition import iid

RULES = {
    "sync": {},
    "quorum": {"quorum": 1, "timeout_s": 1.0},
    "async": {},
    "buffered": {"buffer": 2},
}
MAX_TOKENS = 128


@dataclass(frozen=True)
class Training:
    folder: Path
    address: str
    cohort: CohortSettings
    steps: int
    learning_rate: float


def load(training: Training, member: str):
    return AutoSplitModelForCausalLM.from_pretrained(
        training.folder,
        trunk=training.address,
        dtype="float32",
        lora=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        freeze=("bottom", "top"),
        run="together",
        cohort=training.cohort,
        member=member,
    )


def train(training: Training, model, member: str, texts: list[torch.Tensor]) -> list[str]:
    """One client's whole training; a line for each of its steps."""
    told = []
    model.train()
    for step in range(training.steps):
        ids = texts[step % len(texts)]
        loss, merged = take_step(model, ids, training.learning_rate)
        told.append(
            f"{member}: step {step + 1}, loss {loss:.3f}, {merged.fate.name.lower()} in round {merged.round}"
        )
    model.trunk.leave()  # the others' rounds no longer wait for this one
    return told


def take_step(model, ids: torch.Tensor, learning_rate: float):
    """Again where the trunk has lost it, or others have left its version behind."""
    while True:
        try:
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            return loss.item(), model.trunk.step(
                learning_rate=learning_rate, weight=float(ids[:, 1:].numel())
            )
        except (ContributionLost, StaleGradient):
            continue


def read_texts(data: Path, folder: Path) -> list[torch.Tensor]:
    """(1, T) each; the tiny model has no tokenizer and takes a byte as a token."""
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    encode = AutoTokenizer.from_pretrained(folder).encode if has_tokenizer else lambda text: [*text.encode()]
    examples = (line.example for line in read_lines(data))
    texts = (
        each.prompt + each.completion if isinstance(each, Completion) else each.text for each in examples
    )
    return [torch.tensor([encode(text)[:MAX_TOKENS]]) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model's folder; a tiny random one by default")
    parser.add_argument("--bundled", action="store_true", help="the bundled SmolLM2-135M-Instruct")
    parser.add_argument("--trunk", help="host:port of a server; one is started in this process by default")
    parser.add_argument("--data", type=Path, default=TEXT, help=".jsonl; the demo's text by default")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--rule", choices=RULES, default="sync")
    parser.add_argument("--steps", type=int, default=8, help="of each client")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--output", type=Path, help="where the adapter goes, as PEFT writes it")
    asked = parser.parse_args()

    log_to_stderr()
    torch.set_num_threads(1)
    cohort = CohortSettings(asked.rule, members=asked.clients, **RULES[asked.rule])
    names = [f"client-{number}" for number in range(1, asked.clients + 1)]
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        folder = asked.model or (
            bundled_model() if asked.bundled else lively_model("llama", here / "tiny", vocab_size=256)
        )
        learned, measured = held_out(read_texts(asked.data, folder), share=0.14, seed=0)
        batches = [{"input_ids": ids, "labels": ids} for ids in measured]
        parts = [[learned[index] for index in held] for held in iid(len(learned), asked.clients, seed=0)]

        # A cohort is on the server's disk: with a folder of its own this one is new each time.
        own = nullcontext() if asked.trunk else TrunkServer(folder, port=0, state_dir=here / "state")
        with own as server:
            training = Training(
                folder, asked.trunk or server.address, cohort, asked.steps, asked.learning_rate
            )
            models = [load(training, name) for name in names]
            print(f"held-out loss before: {held_out_loss(models[0], batches):.4f}")
            with ThreadPoolExecutor(asked.clients) as threads:
                for told in threads.map(train, [training] * asked.clients, models, names, parts):
                    print(*told, sep="\n")
            print(f"held-out loss after:  {held_out_loss(models[0], batches):.4f}")
            if asked.output:
                models[0].save_adapter(asked.output)
            for model in models:
                model.trunk.close_run()
                model.close()


if __name__ == "__main__":
    main()
