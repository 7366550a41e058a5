"""The runs of one trunk: opened under a name, joined again after a loss, closed."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

from torch import Tensor

from splitlearn.config import RunConfig
from splitlearn.engine import optimizer
from splitlearn.engine.adapter_table import AdapterTable, fitting
from splitlearn.engine.checkpoint import RunSnapshot
from splitlearn.engine.run import Run
from splitlearn.engine.tape import Tape
from splitlearn.engine.trunk_state import AdapterVersion, TrunkState
from splitlearn.errors import AdapterError, MessageError, ResourceExhausted, RunLost, RunTakenOver
from splitlearn.model import lora
from splitlearn.vocabulary import RunSettings, StepKey
from splitlearn.wire.messages import OpenRun

RUN_BITS = 48


class RunTable:
    """Belongs to the engine's thread. A run outlives its client's connection; its name brings it back."""

    def __init__(self, state: TrunkState, tape: Tape, config: RunConfig, adapters: AdapterTable) -> None:
        self._state = state
        self._adapters = adapters
        self._tape = tape
        self._config = config
        self._runs: dict[str, Run] = {}
        self._by_number: dict[int, Run] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs.values())

    def open(self, client: bytes, asked: OpenRun) -> Run:
        """A new run, its adapter in the trunk's layers.

        Raises:
            MessageError: the name is taken; ResourceExhausted: there are enough runs; AdapterError,
            SettingError: it cannot be trained so.
        """
        if asked.name in self._runs:
            raise MessageError(f"run {asked.name!r} is open already: join it, or take another name")
        if len(self._runs) >= self._config.max_runs:
            raise ResourceExhausted(
                f"{len(self._runs)} runs are open, this server allows {self._config.max_runs}: close one",
                facts={"runs": len(self._runs), "max_runs": self._config.max_runs},
            )
        settings = asked.settings
        self._check(settings)
        slot, weights = None, {}
        if settings.lora.r:
            slot = self._state.new_slot()
            weights = self._state.slots.add(slot, settings.lora, settings.seed)
        try:
            if slot is not None and asked.start_from:
                weights = self._start(asked, weights)
            run = Run(asked.name, secrets.randbits(RUN_BITS) | 1, settings, slot, weights, client)
        except Exception:
            if slot is not None:
                self._state.slots.remove(slot)
            raise
        self._runs[run.name] = self._by_number[run.number] = run
        return run

    def join(self, client: bytes, name: str) -> Run:
        """The run under this name, in a new incarnation: older ones are turned away from now on."""
        run = self.named(name)
        run.rejoin(client)
        self._tape.forget_run(run.number)
        return run

    def restore(self, client: bytes, snapshot: RunSnapshot) -> Run:
        """The run as the snapshot has it, in a new incarnation; opened if it is not open.

        Raises:
            CheckpointError, AdapterError, ResourceExhausted: it cannot be. Where it fails halfway, an open
                run is broken, and a new one is not there.
        """
        is_new = snapshot.name not in self._runs
        run = (
            self.open(client, OpenRun(snapshot.name, snapshot.settings))
            if is_new
            else self.join(client, snapshot.name)
        )
        try:
            run.restore(snapshot)
        except Exception:
            if is_new:
                self.close(run.name)
            raise
        return run

    def named(self, name: str) -> Run:
        """Raises RunLost where no run of this name is open."""
        if name not in self._runs:
            raise RunLost(f"no run {name!r} is open on this server: open it, or restore it from a checkpoint")
        return self._runs[name]

    def find(self, key: StepKey) -> Run:
        """The run that a step belongs to.

        Raises:
            RunLost: it is not here; RunTakenOver: somebody has joined it since; RunBroken: it is not whole.
        """
        run = self._by_number.get(key.run)
        if run is None:
            raise RunLost("the run is not held here (it was closed, or the server restarted): join it again")
        if run.incarnation != key.incarnation:
            raise RunTakenOver(
                f"run {run.name} was joined again as incarnation {run.incarnation}: somebody else trains it "
                f"now, and what incarnation {key.incarnation} still sends is refused. Let this training end"
            )
        run.used_at = time.monotonic()
        run.require_whole()
        return run

    def adapter(self, name: str) -> AdapterVersion:
        """A run's weights as they are now, or a loaded adapter's; raises AdapterError for neither."""
        if name in self._runs:
            return self._runs[name].current
        if (loaded := self._adapters.find(name)) is not None:
            return loaded.version
        raise AdapterError(f"this server has no adapter {name!r}: load it, or leave it out")

    def close(self, name: str) -> Run:
        """Free what the run holds in memory; its checkpoints stay."""
        run = self.named(name)
        del self._runs[name], self._by_number[run.number]
        self._tape.forget_run(run.number)
        if run.slot is not None:
            self._state.slots.remove(run.slot)
        return run

    def expire(self, now: float) -> list[str]:
        """Close the runs that nobody has used for the lease; their names."""
        idle = [run.name for run in self if run.used_at + self._config.run_lease_s < now]
        for name in idle:
            self.close(name)
        return idle

    def _start(self, asked: OpenRun, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """A loaded adapter's weights in place of drawn ones."""
        loaded = self._adapters.find(asked.start_from)
        if loaded is None:
            raise AdapterError(f"no adapter {asked.start_from!r} is loaded on this server: load it first")
        return fitting(loaded.version.weights, drawn)

    def _check(self, settings: RunSettings) -> None:
        """Before anything is added to the trunk."""
        optimizer.require_known(settings.optimizer)
        self._state.require_precision(settings.precision)
        if settings.lora.r:
            lora.check(settings.lora)
        if settings.tape.checkpoint_every:
            self._state.require_checkpointing()
