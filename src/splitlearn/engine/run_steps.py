"""Does a run's steps on the trunk: forward, backward, norms, optimizer step, evaluation."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from splitlearn.engine.member import Member
from splitlearn.engine.run import Run
from splitlearn.engine.tape import KEPT, Tape, TapeEntry
from splitlearn.engine.trunk_state import AdapterVersion, TrunkState
from splitlearn.errors import MessageError, StaleGradient
from splitlearn.model.segments import TrunkSegment
from splitlearn.vocabulary import Phase, RunSettings, Versions
from splitlearn.wire.dtypes import dtype_named
from splitlearn.wire.messages import AnswerMessage, RunStepMessage

# B rows   T tokens   D hidden

Shape = tuple[object, ...]
SHAPES_KEPT = 4096


class RunSteps:
    """Belongs to the engine's thread. A step that was done already is answered from what was kept."""

    def __init__(
        self, trunk: TrunkSegment, state: TrunkState, tape: Tape, *, lease_s: float, staleness_limit: int
    ) -> None:
        self._trunk = trunk
        self._state = state
        self._tape = tape
        self._lease_s = lease_s
        self._staleness_limit = staleness_limit
        self._graph_bytes: dict[Shape, int] = {}

    def do(self, member: Member, asked: RunStepMessage) -> AnswerMessage | None:
        """The answer to one step; None where its cohort answers it later.

        Raises:
            StepOutOfOrder: it is not the step that comes next.
            TapeExpired, StaleGradient: its forward is gone, or too old; ContributionLost: its gradients are.
            ResourceExhausted: the tape has no room for it.
            MessageError: it lacks something.
        """
        self._tape.release(member.number, asked.key.step, asked.acked_through)
        match asked.key.phase:
            case Phase.FORWARD:
                return self._forward(member, asked)
            case Phase.BACKWARD:
                return self._backward(member, asked)
            case Phase.GRADIENT_NORMS:
                return self._norms(member, asked)
            case Phase.OPTIMIZER_STEP:
                return self._optimizer_step(member, asked)
            case Phase.EVALUATE:
                return self._evaluate(member, asked)
            case Phase.ENDS:
                return member.run.of_cohort().tell_ends(member, asked)

    def _forward(self, member: Member, asked: RunStepMessage) -> AnswerMessage:
        run = member.run
        adapter = run.current
        if not member.is_repeating(asked.key.step):
            member.require_next(asked.key.step)
            if run.cohort is not None:
                adapter = run.cohort.underway.pinned(member, asked.key.microbatch, asked.ends_version)
        key = (member.number, asked.key.step, asked.key.microbatch)
        entry = self._tape.get(key)
        if entry is not None and entry.output_BTD is not None and entry.adapter is adapter:
            return self._answer(run, asked, entry.output_BTD)
        assert asked.tensor_BTD is not None
        shape = _shape_of(member, asked)
        needed = asked.tensor_BTD.nbytes + self._graph_bytes.get(shape, 0)
        run.account.require(needed, KEPT)
        self._tape.require_room(needed)
        lease_until = time.monotonic() + self._lease_s
        entry = TapeEntry(asked, adapter, asked.tensor_BTD.nbytes, lease_until, account=run.account)
        if run.settings.tape.recompute:
            with torch.no_grad():
                output_BTD, _ = self._run_trunk(run.settings, asked, adapter)
        else:
            with self._counting(shape):
                output_BTD, entry.input_BTD = self._run_trunk(run.settings, asked, adapter)
            entry.output_BTD = output_BTD
            entry.bytes += self._graph_bytes[shape]
        self._tape.put(key, entry)
        return self._answer(run, asked, output_BTD)

    def _backward(self, member: Member, asked: RunStepMessage) -> AnswerMessage:
        run = member.run
        microbatch = (asked.key.step, asked.key.microbatch)
        key = (member.number, *microbatch)
        if (kept := self._tape.answer(key)) is not None:
            return kept
        if not asked.want_input_gradient and member.contribution.has(microbatch):
            return self._answer(run, asked, None)
        entry = self._tape.take(key)
        self._require_fresh(member, entry)
        gradient_BTD, gradients = self._gradients(run, entry, asked)
        if not member.is_repeating(asked.key.step):
            member.contribution.add_once(microbatch, gradients, asked.loss_scale)
        answer = self._answer(run, asked, gradient_BTD)
        if asked.want_input_gradient:
            self._tape.keep_answer(key, answer)
        return answer

    def _require_fresh(self, member: Member, entry: TapeEntry) -> None:
        run = member.run
        if run.cohort is not None:
            if not member.is_repeating(entry.asked.key.step):
                run.cohort.underway.require_underway(member, entry.adapter)
            return
        age = run.version - entry.adapter.number
        if age > self._staleness_limit:
            raise StaleGradient(
                f"this gradient's forward used version {entry.adapter.number}, run {run.name} is at "
                f"{run.version}, and {self._staleness_limit} steps between them are allowed: forward again",
                facts={"current_version": run.version, "staleness": age},
            )

    def _gradients(
        self, run: Run, entry: TapeEntry, asked: RunStepMessage
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """With respect to the input, where it is wanted, and to each weight in the run's order."""
        output_BTD, input_BTD = entry.output_BTD, entry.input_BTD
        if output_BTD is None:
            output_BTD, input_BTD = self._run_trunk(run.settings, entry.asked, entry.adapter)
        # A recomputed layer runs now, so it must find what its forward found.
        self._set(run.settings, entry.asked, entry.adapter)
        wanted: list[Tensor] = list(entry.adapter.weights.values())
        if asked.want_input_gradient:
            assert input_BTD is not None
            if not input_BTD.requires_grad:
                raise MessageError(
                    "the gradient at the lower cut is wanted, but its forward said it would not be"
                )
            wanted = [input_BTD, *wanted]
        if not wanted:
            return None, []
        assert asked.tensor_BTD is not None
        gradient_BTD = asked.tensor_BTD.to(output_BTD.device, output_BTD.dtype)
        if gradient_BTD.shape != output_BTD.shape:
            raise MessageError(
                f"a gradient of shape {list(gradient_BTD.shape)} for an activation of "
                f"{list(output_BTD.shape)}"
            )
        # On this thread: torch has one other thread a device, which a client in this process may hold.
        with torch.autograd.set_multithreading_enabled(False):
            found: list[Tensor | None] = [
                *torch.autograd.grad(output_BTD, wanted, gradient_BTD, allow_unused=True)
            ]
        return (found.pop(0) if asked.want_input_gradient else None), found

    def _norms(self, member: Member, asked: RunStepMessage) -> AnswerMessage:
        run = member.run
        if not member.is_repeating(asked.key.step):
            member.require_next(asked.key.step)
        return AnswerMessage(
            asked.key, norms=member.contribution.norms(), versions=Versions(run.name, run.version)
        )

    def _optimizer_step(self, member: Member, asked: RunStepMessage) -> AnswerMessage | None:
        run = member.run
        if run.cohort is not None:
            answer = run.cohort.take(member, asked)
            self._tape.forget_answers(member.number)
            return answer
        if (kept := member.kept_step(asked.key.step)) is not None:
            return kept
        if asked.optimizer is None:
            raise MessageError("an optimizer step says by what to scale the gradients, and its learning rate")
        run.apply(asked.optimizer)
        self._tape.forget_answers(member.number)
        if asked.optimizer.skip:
            # What was dropped stays dropped, even if its backward arrives late.
            self._tape.forget_run(member.number)
        member.last = AnswerMessage(
            asked.key, versions=Versions(run.name, run.version), stepped=not asked.optimizer.skip
        )
        return member.last

    def _evaluate(self, member: Member, asked: RunStepMessage) -> AnswerMessage:
        run = member.run
        adapter = run.current
        if member.given is not None and member.given.number == asked.ends_version:
            adapter = member.given
        with torch.no_grad():
            output_BTD, _ = self._run_trunk(run.settings, asked, adapter)
        return self._answer(run, asked, output_BTD)

    def _run_trunk(
        self, settings: RunSettings, asked: RunStepMessage, adapter: AdapterVersion
    ) -> tuple[Tensor, Tensor]:
        """The activation at the upper cut, and the input that it was computed from."""
        try:
            return self._forward_through(settings, asked, adapter)
        except Exception as error:
            if not self._state.compiled.give_up(error):
                raise
            return self._forward_through(settings, asked, adapter)

    def _forward_through(
        self, settings: RunSettings, asked: RunStepMessage, adapter: AdapterVersion
    ) -> tuple[Tensor, Tensor]:
        assert asked.tensor_BTD is not None
        self._set(settings, asked, adapter)
        autocast = settings.precision.autocast
        device = self._trunk.device
        # Under autocast the state between layers keeps the precision that it arrives in.
        input_BTD = asked.tensor_BTD.to(device, None if autocast else self._trunk.dtype)
        # A leaf of its own: what arrived may be asked for again.
        input_BTD = input_BTD.detach().clone().requires_grad_(asked.want_input_gradient)
        mask_BT, positions_BT = asked.mask_columns_BT, asked.positions_BT
        rows, tokens = input_BTD.shape[:2]
        if positions_BT is None:
            positions_BT = torch.arange(tokens).expand(rows, tokens)
        kind = dtype_named(autocast) if autocast else None
        with _seeded(asked.seed, device), torch.autocast(device.type, kind, enabled=kind is not None):
            output_BTD = self._trunk(
                input_BTD,
                attention_mask=None if mask_BT is None else mask_BT.long().to(device),
                position_ids=positions_BT.to(device),
            )
        return output_BTD, input_BTD

    def _set(self, settings: RunSettings, asked: RunStepMessage, adapter: AdapterVersion) -> None:
        # Layers are only recomputed in training mode; without a seed nothing in it is random.
        is_forward = asked.key.phase is not Phase.EVALUATE
        self._state.set(
            adapter,
            training=is_forward and bool(asked.seed),
            checkpoint_every=settings.tape.checkpoint_every,
        )

    def _answer(self, run: Run, asked: RunStepMessage, tensor_BTD: Tensor | None) -> AnswerMessage:
        versions = Versions(run.name, run.version)
        if tensor_BTD is None:
            return AnswerMessage(asked.key, versions=versions)
        assert asked.tensor_BTD is not None
        return AnswerMessage(asked.key, tensor_BTD.detach().to(asked.tensor_BTD.dtype), versions=versions)

    @contextlib.contextmanager
    def _counting(self, shape: Shape) -> Iterator[None]:
        """Learn how many bytes the graph keeps, at the first forward of each shape."""
        if shape in self._graph_bytes:
            yield
            return
        if len(self._graph_bytes) >= SHAPES_KEPT:
            self._graph_bytes.clear()
        saved: list[weakref.ref[Tensor]] = []

        def note(tensor: Tensor) -> Tensor:
            # An alias: the tensor itself would hold the graph that holds it.
            alias = tensor.detach()
            saved.append(weakref.ref(alias))
            return alias

        with saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        # Only now: the forward has bound its adapter, and let go of what it needed in between.
        weights = {weight.data_ptr() for weight in self._trunk.parameters()}
        kept = [each for ref in saved if (each := ref()) is not None and each.data_ptr() not in weights]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
        self._graph_bytes[shape] = sum(storages.values())


def _shape_of(member: Member, asked: RunStepMessage) -> Shape:
    """What the size of a graph depends on."""
    return (
        member.run.slot,
        asked.rows,
        asked.tokens,
        asked.mask_columns_BT is None,
        asked.positions_BT is None,
        asked.want_input_gradient,
        bool(asked.seed),
    )


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers that depend on the seed alone, so that the same forward drops the same."""
    if not seed:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
