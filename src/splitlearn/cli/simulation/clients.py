"""The clients of a simulation: each a process that can be killed and begun again, and what is known of it."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from splitlearn.cli.simulation.reports import Activity, Does, Ended, Failed, Lost, Report, Stepped
from splitlearn.errors import SimulationFailed

if TYPE_CHECKING:
    from splitlearn.cli.simulation.client import Task

IMPORTED_ONCE = "splitlearn.cli.simulation.client"
STOP_S, LAST_LINES = 10.0, 5


@dataclass(slots=True)
class Client:
    """What its process has told, over all of its starts."""

    number: int
    name: str
    steps: int
    factor: float
    log: Path
    activity: Activity = Activity.NOT_BEGUN
    step: int = 0
    loss: float | None = None
    staleness: int | None = None
    tokens_per_s: float | None = None
    tokens: int = 0
    starts: int = 0
    kills: int = 0
    ended: Ended | None = None
    back_at: float | None = None
    """When it is begun again, where it was killed and is to be."""
    losses: list[float] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Nothing more is to be expected of it."""
        return self.ended is not None or (self.activity is Activity.KILLED and self.back_at is None)

    def hear(self, report: Report) -> None:
        """Raises SimulationFailed where it says that it has failed."""
        match report:
            case Does(activity):
                self.activity = activity
            case Stepped(step, tokens, seconds, staleness):
                self.step, self.staleness = step, staleness
                self.tokens += tokens
                self.tokens_per_s = tokens / seconds if seconds else None
            case Lost(loss):
                self.loss = loss
                self.losses.append(loss)
            case Ended():
                self.ended, self.activity = report, Activity.DONE
            case Failed(message):
                raise SimulationFailed(f"{self.name}: {message}; its log is {self.log}")

    def last_words(self) -> str:
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        except OSError:
            lines = []
        return "\n".join(lines[-LAST_LINES:]) or "its log is empty"


class Clients:
    """Their processes; a context manager that ends all of them.

    They are forked from a process that has imported everything and does nothing else: torch's and gRPC's
    threads come after the fork, and a start costs a fraction of a second.
    """

    def __init__(self, known: Sequence[Client]) -> None:
        self.known = list(known)
        self._processes: dict[int, Any] = {}
        self._lines: dict[int, Connection] = {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([IMPORTED_ONCE])
        # It imports while the server starts.
        forkserver.ensure_running()

    def __iter__(self) -> Iterator[Client]:
        return iter(self.known)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.terminate()
        until = time.monotonic() + STOP_S
        for number in list(self._processes):
            self._processes[number].join(max(until - time.monotonic(), 0))
            self._end(number)

    def start(self, client: Client, task: Task) -> None:
        from splitlearn.cli.simulation.client import be_client

        ours, theirs = self._context.Pipe()
        told = (task, theirs, client.log)
        process = self._context.Process(target=be_client, args=told, name=client.name, daemon=True)
        client.activity, client.back_at, client.starts = Activity.STARTING, None, client.starts + 1
        with _no_script():
            process.start()
        theirs.close()
        self._processes[client.number], self._lines[client.number] = process, ours

    def kill(self, client: Client, back_after_s: float | None) -> None:
        """With SIGKILL; what it has told until then is heard."""
        process = self._processes[client.number]
        process.kill()
        process.join(STOP_S)
        self._hear(client)
        self._end(client.number)
        client.activity, client.kills = Activity.KILLED, client.kills + 1
        client.back_at = None if back_after_s is None else time.monotonic() + back_after_s

    def listen(self, timeout_s: float) -> bool:
        """Hear what there is to hear, for so long at most; whether there was anything.

        Raises:
            SimulationFailed: a client has failed, or died unasked.
        """
        there = [*self._lines.values(), *(process.sentinel for process in self._processes.values())]
        if not connection.wait(there, timeout_s):
            return False
        for client in self.known:
            if client.number in self._processes:
                self._hear(client)
                self._require_alive(client)
        return True

    def go_on(self) -> None:
        """Let those that wait for the others go on."""
        for client in self.known:
            if client.activity is Activity.TRAINED:
                client.activity = Activity.MEASURING
                self._lines[client.number].send(True)

    def _hear(self, client: Client) -> None:
        line = self._lines[client.number]
        try:
            while line.poll():
                client.hear(line.recv())
        except (EOFError, OSError):
            return

    def _require_alive(self, client: Client) -> None:
        process = self._processes[client.number]
        if process.is_alive():
            return
        self._hear(client)
        self._end(client.number)
        if client.ended is None or process.exitcode:
            raise SimulationFailed(
                f"{client.name} died unasked with exit code {process.exitcode} at step {client.step}; its "
                f"log, {client.log}, ends with: {client.last_words()}"
            )

    def _end(self, number: int) -> None:
        process = self._processes.pop(number)
        if process.is_alive():
            process.kill()
            process.join(STOP_S)
        self._lines.pop(number).close()


@contextmanager
def _no_script() -> Iterator[None]:
    """A process that starts within does not run the user's script again, of which it needs nothing."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
