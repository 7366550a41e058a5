"""How the client reaches a trunk: gRPC, or in this process for tests."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from splitlearn.vocabulary import StepKey
from splitlearn.wire.handshake import Agreement
from splitlearn.wire.messages import (
    AdapterMessage,
    AnswerMessage,
    AveragedEnds,
    CloseMessage,
    ForkMessage,
    GivenEnds,
    OpenRun,
    RunFacts,
    RunStepMessage,
    StepMessage,
)
from splitlearn.wire.sessions import MovedSession


@dataclass(slots=True)
class Traffic:
    """What crossed the wire so far, both ways: bytes of activations alone, and of whole messages."""

    tensor_bytes: int = 0
    message_bytes: int = 0
    messages: int = 0
    received_bytes: int = 0
    """Those of `message_bytes` that came from the trunk."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def count(self, tensor_bytes: int, message_bytes: int, *, received: bool = False) -> None:
        with self._lock:
            self.tensor_bytes += tensor_bytes
            self.message_bytes += message_bytes
            self.messages += 1
            if received:
                self.received_bytes += message_bytes


class Transport(Protocol):
    """One connection of one client. Every call ends by its deadline, with an answer or a typed error."""

    agreement: Agreement
    traffic: Traffic

    def step(self, message: StepMessage) -> AnswerMessage:
        """Have the step done; an error of the server is raised here."""
        ...

    def run_step(self, message: RunStepMessage) -> AnswerMessage:
        """Have a run's step done; an error of the server is raised here."""
        ...

    def open_run(self, asked: OpenRun) -> RunFacts:
        """Begin a run; raises where its name is taken."""
        ...

    def join_run(self, name: str, member: str = "") -> RunFacts:
        """Take a run over in a new incarnation, or be this member of it; raises RunLost for none."""
        ...

    def renew_member(self, name: str, incarnation: int) -> None:
        """Say that this cohort's member is there; raises RunLost or RunTakenOver where it is not one."""
        ...

    def leave_run(self, name: str) -> None:
        """Be no member of this run any more; raises RunLost where it was none."""
        ...

    def run_facts(self, name: str) -> RunFacts:
        """Where a run stands, open or on disk; raises RunLost where there is none."""
        ...

    def save_run(self, name: str, at: StepKey, acknowledged: Sequence[int]) -> RunFacts:
        """Have the run, as it stands after this key's step, written to the server's disk.

        Others that are older than the newest acknowledged step are deleted there, unless acknowledged, too.
        Raises RunTakenOver where another incarnation trains the run.
        """
        ...

    def restore_run(self, name: str, step: int, digest: int = 0) -> RunFacts:
        """Take a run over as its checkpoint has it; raises CheckpointError if that has another digest."""
        ...

    def close_run(self, name: str) -> None:
        """Free what a run holds in the server's memory; raises RunLost where none of this name is open."""
        ...

    def delete_run(self, name: str) -> int:
        """Remove a run from the server's memory and disk; the bytes that frees. Raises RunLost for none."""
        ...

    def download_adapter(self, name: str) -> AdapterMessage:
        """The trunk's part of a run's adapter; raises AccessDenied where the run does not allow it."""
        ...

    def give_ends(self, name: str, at: StepKey, given: GivenEnds) -> None:
        """Bring this member's part of an average; raises AdapterError where it does not fit the others'."""
        ...

    def take_average(self, name: str, at: StepKey, number: int, since: int) -> AveragedEnds:
        """This average or a newer one; raises RoundUnfinished where it takes long, and is asked for again."""
        ...

    def load_adapter(self, adapter: AdapterMessage) -> None:
        """Put an adapter's weights beside the trunk; raises AdapterError where they do not fit it."""
        ...

    def unload_adapter(self, name: str) -> None:
        """Take it away again."""
        ...

    def fork(self, message: ForkMessage) -> None:
        """Have the session copied; returns when it is."""
        ...

    def export_session(self, session: int, layers: int) -> MovedSession:
        """All that the server holds of a session, by the trunk's layers; the session stays as it is."""
        ...

    def import_session(self, session: int, moved: MovedSession) -> None:
        """Have the server hold this under the new number, from step 1 on; raises where it does not fit."""
        ...

    def close_session(self, message: CloseMessage) -> None:
        """Say that the session is over; does not wait and cannot fail."""
        ...

    def close(self) -> None:
        """End the connection in order; waits a moment for what was told to arrive."""
        ...

    def abandon(self) -> None:
        """The same without waiting, for the garbage collector."""
        ...
