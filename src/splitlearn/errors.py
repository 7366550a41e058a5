"""Every error a user can meet, in one tree; each says what to do and whether trying again can help.

Each class names the wire code it travels under. A server raises the class, the client
receives the same class again with the same words (`splitlearn.wire.status`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self


class SplitLearnError(Exception):
    """Root of the tree.

    `facts` are the figures behind the message (bytes, steps, limits) for programs that act on them.
    """

    retryable = False

    def __init__(self, message: str, *, facts: Mapping[str, str | int | float] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.facts = dict(facts or {})

    def again(self) -> Self:
        """The same error as a new object: raised on several threads, one would collect all their frames."""
        return type(self)(self.message, facts=self.facts)

    def advised(self, then: str) -> Self:
        """The same error where it is known what was being done, and so what to do then."""
        between = " " if self.message.endswith("?") else ". "
        return type(self)(f"{self.message}{between}{then}", facts=self.facts)


# What the user asked for cannot be done as it stands.


class SettingError(SplitLearnError):
    """A setting is out of its range or contradicts another."""


class SplitPlanError(SettingError):
    """The cut leaves no trunk, or takes more layers than the model has."""


class DataError(SettingError):
    """A training file cannot be learned from as it is; the message names the file and the line."""


class UnsupportedModel(SplitLearnError):
    """This family, or this kind of checkpoint, is not proven to be cut exactly; nothing was loaded."""


class CheckpointError(SplitLearnError):
    """A model folder or hub id cannot be read: missing, torn, pickled, or of another split."""


class UnsupportedCall(SplitLearnError):
    """The client's model refuses this call, because its result would be wrong."""


class AdapterError(SplitLearnError):
    """A LoRA setting or an adapter's tensors are not acceptable here."""


# The trunk cannot be reached, or is not the one that was meant.


class TrunkUnreachable(SplitLearnError):
    """Nothing answers at this address, or the connection broke."""

    retryable = True


class TrunkDraining(TrunkUnreachable):
    """The server is stopping: running steps finish, new sessions are refused."""


class NotATrunk(SplitLearnError):
    """Something answers at this address, but it is not a SplitLearn server."""


class ProtocolMismatch(SplitLearnError):
    """Client and server speak different versions of the protocol."""


class ModelMismatch(SplitLearnError):
    """The server holds the trunk of another model, for example the base of an instruct version."""


class SplitMismatch(ModelMismatch):
    """The server holds the same model, cut elsewhere."""


class AccessDenied(SplitLearnError):
    """The server wants credentials, or these credentials do not own what was named."""


# A message is not what it should be.


class FrameError(SplitLearnError):
    """A tensor on the wire is malformed: dtype, shape, size, codec or role."""


class CorruptFrame(FrameError):
    """A tensor's bytes do not match their checksum: the network or the memory changed them."""

    retryable = True


class MessageError(SplitLearnError):
    """A message's fields contradict each other or the session's state."""


# Runs.


class RunLost(SplitLearnError):
    """The server does not have this run: resume from its newest checkpoint."""


class RunTakenOver(RunLost):
    """Somebody has joined or resumed this run since: it is theirs now, and this training ends."""


class RunBroken(RunLost):
    """The trunk's optimizer, or a restore, failed halfway: restore the run's last checkpoint."""


class TapeExpired(SplitLearnError):
    """What a forward kept for its gradient is gone: forward again (the client does so by itself)."""

    retryable = True


class StaleGradient(SplitLearnError):
    """The adapter has moved on since this gradient's forward: it is refused, and that batch with it."""


class RoundUnfinished(SplitLearnError):
    """The cohort's round still waits for others: ask again (the client does so by itself)."""

    retryable = True


class ContributionLost(SplitLearnError):
    """What this step's microbatches had added up to is gone: compute them again (SplitTrainer does)."""

    retryable = True


class UnappliedGradients(SplitLearnError):
    """The trunk holds gradients that no optimizer step has used: it would silently not be trained."""


# Steps, sessions, limits.


class StepOutOfOrder(SplitLearnError):
    """The step is not the one that comes next; `facts` has the server's `current_step`."""


class SessionLost(SplitLearnError):
    """The server no longer holds this session: generate again from the prompt."""

    retryable = True


class SessionExpired(SessionLost):
    """The session was idle longer than its lease and was closed."""


class SessionTooLong(SplitLearnError):
    """The text is longer than the model's positions or than a session may hold."""


class ResourceExhausted(SplitLearnError):
    """The server has no room for this now; `facts` has what is wanted, free and total."""

    retryable = True


class KvBudgetExceeded(ResourceExhausted):
    """The session's keys and values do not fit into the server's KV budget."""


class StepTimeout(SplitLearnError):
    """The answer did not come within the deadline."""

    retryable = True


class NotServed(SplitLearnError):
    """The protocol has this call, but this server does not serve it."""


class TrunkFailed(SplitLearnError):
    """The server failed at this step; its log has the cause under the id in the message."""


class SimulationFailed(SplitLearnError):
    """A client of a simulation failed or died unasked, or the simulation took longer than it may."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its kind where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def another_training(run: str, steps: Sequence[int]) -> CheckpointError:
    """The one wording of a check that both sides make: two halves of different trainings are not joined."""
    which = f"step {steps[0]}" if len(steps) == 1 else f"steps {', '.join(map(str, steps))}"
    return CheckpointError(
        f"what the server has of {which} of run {run} was not saved with this checkpoint: the run was "
        "started over, or trained on from elsewhere, since. Resume from that training's folder, or train "
        "from the start under another run name"
    )


def too_long_for_model(tokens: int, max_positions: int) -> SessionTooLong:
    """The one wording of a limit that both sides check."""
    return SessionTooLong(
        f"the text would be {tokens:,} tokens long, the model has {max_positions:,} positions: shorten it",
        facts={"tokens": tokens, "max_positions": max_positions},
    )
