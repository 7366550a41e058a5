"""What is simulated: every setting of a simulation, as its YAML file has it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from splitlearn.cli.cohort_options import CohortFigures, RuleName
from splitlearn.cli.scheme_settings import PartitionSettings
from splitlearn.cli.train_settings import TrainSettings
from splitlearn.config import Settings
from splitlearn.errors import SettingError
from splitlearn.vocabulary import CohortSettings

DEMO = "demo"
MAX_CLIENTS = 256
OWN = {"data", "output", "resume", "run", "held_out"}
"""Settings of a training that the simulator gives each client itself."""


class Rule(CohortFigures):
    """Whose gradients make a round: the names are those of `splitlearn train`."""

    rule: RuleName = "sync"
    """When a round is closed: `sync`, `quorum`, `async` or `buffered`."""


class Dealing(PartitionSettings):
    """Who gets which lines: the names are those of `splitlearn partition`."""

    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of all examples that no client gets: the loss on it is measured before and after."""

    @model_validator(mode="before")
    @classmethod
    def _clients_are_counted_once(cls, told: Any) -> Any:
        if isinstance(told, dict) and "clients" in told:
            raise ValueError("clients stands above, beside the model: leave it out here")
        return told


class ClientTraining(TrainSettings):
    """How each client trains: the names are those of `splitlearn train`."""

    data: list[Path] = Field(default=[])
    output: Path = Path()
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_steps: PositiveInt
    """Optimizer steps of each client."""
    accumulation: PositiveInt = 1
    """Batches that make one optimizer step."""
    log_steps: PositiveInt = 1
    """Steps between a client's logs of its loss."""

    @model_validator(mode="before")
    @classmethod
    def _is_a_clients(cls, told: Any) -> Any:
        if isinstance(told, dict) and (own := sorted(OWN & told.keys())):
            raise ValueError(f"each client is given its own {', '.join(own)}: leave it out")
        return told


class Straggler(Settings):
    """A client that computes slower than the others."""

    client: PositiveInt
    """Its number, from 1."""
    factor: Annotated[float, Field(ge=1, le=1000)]
    """How many times as long its steps take: after each it sleeps factor - 1 times what it took."""


class Kill(Settings):
    """A client that is killed (SIGKILL)."""

    client: PositiveInt
    """Its number, from 1."""
    at_step: PositiveInt
    """So many of its steps are done then."""
    back_after_s: Annotated[float | None, Field(ge=0)] = 3.0
    """Seconds until it is begun again under its name; null is never."""


class Add(Settings):
    """A client that joins late, with data of its own."""

    at_step: PositiveInt
    """So many steps has the furthest of the others done then."""
    steps: PositiveInt | None = None
    """Optimizer steps that it does; by default those that are left then."""


class Faults(Settings):
    """What happens to the clients meanwhile."""

    kill: list[Kill] = Field(default=[])
    """Clients that are killed, and begun again."""
    add: list[Add] = Field(default=[])
    """Clients that join late."""


class Simulation(Settings):
    """One server and many clients on this machine."""

    model: str
    """Folder or hub id of the model; `demo` is the bundled one."""
    data: str
    """The .jsonl file that is dealt out, or a .txt file, of which each paragraph is an example; `demo` is the
    demo's."""
    output: Path
    """Folder to write; it must be new or empty."""
    clients: Annotated[int, Field(ge=1, le=MAX_CLIENTS)]
    """How many there are at the beginning."""
    cohort: Rule = Rule()
    """By which rule their gradients are merged."""
    partition: Dealing = Dealing()
    """Who gets which lines of the data."""
    train: ClientTraining
    """How each client trains."""
    stragglers: list[Straggler] = Field(default=[])
    """Clients that are slower."""
    faults: Faults = Faults()
    """Clients that are killed, or join late."""
    serve: list[str] = Field(default=[])
    """Further options of `splitlearn serve`, each word an item."""
    deadline_s: PositiveFloat = 3600.0
    """When the whole is given up."""
    quiet_s: PositiveFloat = 600.0
    """When it is given up because no client has done anything."""

    @property
    def all_clients(self) -> int:
        """With those that join late."""
        return self.clients + len(self.faults.add)

    @property
    def cohort_settings(self) -> CohortSettings:
        """Raises SettingError for figures that make no round."""
        return self.cohort.cohort_of(self.cohort.rule, self.clients, "cohort.{}".format)

    @property
    def dealing(self) -> PartitionSettings:
        """Raises SettingError where the scheme lacks a setting, or does not read one."""
        return self.partition.model_copy(update={"clients": self.all_clients}).filled_in()

    @property
    def first_who_stays(self) -> int:
        """A client that is not killed for good."""
        gone = {kill.client for kill in self.faults.kill if kill.back_after_s is None}
        return next((number for number in range(1, self.clients + 1) if number not in gone), 1)

    def factor_of(self, client: int) -> float:
        return next((each.factor for each in self.stragglers if each.client == client), 1.0)

    def steps_of(self, client: int) -> int:
        if client <= self.clients:
            return self.train.max_steps
        late = self.faults.add[client - self.clients - 1]
        return late.steps or self.train.max_steps - late.at_step

    def require_consistent(self) -> None:
        """Raises SettingError for settings that contradict each other, or never take effect."""
        _ = self.cohort_settings, self.dealing
        self.train.require_consistent()
        for name, each in self._about_clients():
            if each.client > self.all_clients:
                raise SettingError(f"{name}: there is no client {each.client} of {self.all_clients}")
        for place, late in enumerate(self.faults.add):
            _require_before(f"faults.add.{place}", late.at_step, self.train.max_steps)
        for place, kill in enumerate(self.faults.kill):
            _require_before(f"faults.kill.{place}", kill.at_step, self.steps_of(kill.client))
        slow = [each.client for each in self.stragglers]
        if twice := {client for client in slow if slow.count(client) > 1}:
            raise SettingError(f"stragglers: client {min(twice)} is there twice: leave one out")

    def _about_clients(self) -> list[tuple[str, Straggler | Kill]]:
        slow = [(f"stragglers.{place}.client", each) for place, each in enumerate(self.stragglers)]
        killed = [(f"faults.kill.{place}.client", each) for place, each in enumerate(self.faults.kill)]
        return [*slow, *killed]


def _require_before(name: str, at_step: int, steps: int) -> None:
    if at_step >= steps:
        raise SettingError(
            f"{name}.at_step: {at_step} never comes before the last of {steps} steps: lower it"
        )
