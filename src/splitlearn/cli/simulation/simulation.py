"""A simulation from its settings to its summary: a server, clients, and what happens to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from splitlearn.cli.simulation.clients import Client, Clients
from splitlearn.cli.simulation.config import Kill, Simulation
from splitlearn.cli.simulation.folder import Folder
from splitlearn.cli.simulation.reports import Activity
from splitlearn.cli.simulation.summary import Summary, summary_of
from splitlearn.cli.trunk_process import TrunkProcess
from splitlearn.errors import SimulationFailed

POLL_S = 0.25
Show = Callable[[Sequence[Client]], None]


def simulate(config: Simulation, show: Show = lambda clients: None) -> Summary:
    """Run it in processes of their own; what it leaves lies in its output folder.

    Whatever happens, none of its processes is left when this returns or raises.

    Args:
        config: its settings.
        show: is told, a few times a second, where the clients stand.

    Raises:
        SettingError: the settings contradict each other, or the output folder has something in it.
        DataError: the data cannot be dealt out so.
        TrunkUnreachable: the server could not start, or ended.
        SimulationFailed: a client failed or died unasked, or a deadline has passed.
    """
    config.require_consistent()
    folder = Folder.new(config)
    began = time.monotonic()
    options = [*config.serve, "--state-dir", str(folder.server_state)]
    clients = Clients([_client(config, folder, number) for number in range(1, config.all_clients + 1)])
    # Inside, so that they end first: a server lets those that are there finish.
    with TrunkProcess(folder.model, *options, log=folder.server_log) as trunk, clients:
        Course(config, folder, clients, trunk).run(show)
    summary = summary_of(config, folder, clients.known, time.monotonic() - began)
    summary.write(folder.summary)
    return summary


@dataclass(slots=True)
class Course:
    """What happens until all clients have ended."""

    config: Simulation
    folder: Folder
    clients: Clients
    trunk: TrunkProcess

    def run(self, show: Show) -> None:
        """Raises as `simulate`."""
        until = heard = time.monotonic()
        until += self.config.deadline_s
        kills = list(self.config.faults.kill)
        for client in self.clients.known[: self.config.clients]:
            self._start(client)
        while not all(client.is_over for client in self.clients):
            now = time.monotonic()
            if self.clients.listen(POLL_S):
                heard = now
            self._kill_who_is_due(kills)
            self._begin_who_is_due(now)
            if all(client.is_over or client.activity is Activity.TRAINED for client in self.clients):
                self.clients.go_on()
            self.trunk.require_alive()
            self._require_in_time(now, until, heard)
            show(self.clients.known)

    def _start(self, client: Client) -> None:
        self.clients.start(client, self.folder.task(client, self.trunk.address))

    def _kill_who_is_due(self, kills: list[Kill]) -> None:
        for kill in list(kills):
            client = self.clients.known[kill.client - 1]
            if client.step >= kill.at_step and client.activity not in (Activity.KILLED, Activity.STARTING):
                kills.remove(kill)
                self.clients.kill(client, kill.back_after_s)

    def _begin_who_is_due(self, now: float) -> None:
        furthest = max(client.step for client in self.clients)
        late = self.clients.known[self.config.clients :]
        for client, add in zip(late, self.config.faults.add, strict=True):
            if client.activity is Activity.NOT_BEGUN and furthest >= add.at_step:
                self._start(client)
        for client in self.clients:
            if client.back_at is not None and client.back_at <= now:
                self._start(client)

    def _require_in_time(self, now: float, until: float, heard: float) -> None:
        limits = {"deadline_s": (until, self.config.deadline_s)}
        limits["quiet_s"] = (heard + self.config.quiet_s, self.config.quiet_s)
        for name, (end, seconds) in limits.items():
            if now > end:
                where = ", ".join(
                    f"{each.name} {each.activity.value} at {each.step}" for each in self.clients
                )
                raise SimulationFailed(
                    f"{name} = {seconds:g} has passed ({where}): look into {self.folder.logs}, or raise it"
                )


def _client(config: Simulation, folder: Folder, number: int) -> Client:
    name = folder.name_of(number)
    return Client(number, name, config.steps_of(number), config.factor_of(number), folder.log_of(name))
