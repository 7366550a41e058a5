"""What a simulation leaves: the data as they were dealt, logs, curves, adapters, the summary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml  # type: ignore[import-untyped]  # transformers depends on it

from splitlearn.cli.demo_model import bundled_model
from splitlearn.cli.holdings import HELD_OUT, Partition
from splitlearn.cli.new_folder import new_folder
from splitlearn.cli.partition import draw_if_possible
from splitlearn.cli.simulation.config import DEMO, Simulation
from splitlearn.training.lines import read_examples, read_lines

if TYPE_CHECKING:
    from splitlearn.cli.simulation.client import Task
    from splitlearn.cli.simulation.clients import Client

DEMO_TEXT = Path(__file__).parent.parent / "demo_text.jsonl"
CURVES = "tensorboard"
RUN = "simulation"


@dataclass(frozen=True, slots=True)
class Folder:
    """A simulation's output, and who finds what where."""

    config: Simulation
    root: Path
    model: str
    names: tuple[str, ...]
    examples: tuple[int, ...]
    """Of each client, in their order."""
    has_held_out: bool

    @classmethod
    def new(cls, config: Simulation) -> Folder:
        """Make it, with each client's data in it.

        Raises:
            SettingError: it is not empty, or cannot be written; DataError: the data cannot be dealt so.
        """
        with new_folder(config.output) as growing:
            dealt = _dealt(config, growing)
            for name in ("clients", "logs"):
                (growing / name).mkdir()
            asked = config.model_dump(mode="json", exclude_unset=True)
            (growing / "simulation.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))
        own = [each for each in dealt.holdings if each.name != HELD_OUT]
        return cls(
            config,
            # Clients' processes may have another current folder.
            config.output.resolve(),
            _model_of(config),
            tuple(each.name for each in own),
            tuple(len(each.examples) for each in own),
            len(own) < len(dealt.holdings),
        )

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def server_log(self) -> Path:
        return self.logs / "server.log"

    @property
    def server_state(self) -> Path:
        return self.root / "server"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    def name_of(self, number: int) -> str:
        return self.names[number - 1]

    def log_of(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def output_of(self, name: str) -> Path:
        return self.root / "clients" / name

    def task(self, client: Client, address: str) -> Task:
        """What this client is started with."""
        from splitlearn.cli.simulation.client import Task

        config, data = self.config, self.root / "data"
        is_killed = any(kill.client == client.number for kill in config.faults.kill)
        own = {
            "data": [data / f"{client.name}.jsonl"],
            "output": self.output_of(client.name),
            "run": RUN,
            "max_steps": client.steps,
            # Who is killed comes back from its newest step.
            **({"save_steps": 1} if is_killed else {}),
        }
        self.output_of(client.name).mkdir(exist_ok=True)
        return Task(
            model=self.model,
            trunk=address,
            training=config.train.model_copy(update=own),
            cohort=config.cohort_settings,
            member=client.name,
            factor=client.factor,
            held_out=data / f"{HELD_OUT}.jsonl" if self.has_held_out else None,
            measures_before=client.number == config.first_who_stays,
            tensorboard=self.root / CURVES / client.name,
            patience_s=config.deadline_s,
        )


def _model_of(config: Simulation) -> str:
    if config.model == DEMO:
        return str(bundled_model())
    return str(Path(config.model).resolve()) if Path(config.model).exists() else config.model


def _dealt(config: Simulation, growing: Path) -> Partition:
    file = DEMO_TEXT if config.data == DEMO else Path(config.data)
    folder = growing / "data"
    folder.mkdir()
    if file.suffix == ".txt":
        file = _paragraphs(file, folder / f"{file.stem}.jsonl")
    dealt = Partition.of(file, read_lines(file), config.dealing)
    dealt.write_into(folder)
    draw_if_possible(dealt, folder / "partition.png")
    return dealt


def _paragraphs(file: Path, into: Path) -> Path:
    """A plain text as lines of JSON, one for each paragraph: what an empty line ends."""
    (document,) = read_examples(file)
    text = getattr(document, "text", "")
    told = [json.dumps({"text": each.strip()}) for each in text.split("\n\n") if each.strip()]
    into.write_text("\n".join(told) + "\n", encoding="utf-8")
    return into
