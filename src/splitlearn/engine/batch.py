"""Several sessions' steps, or pieces of them, as one forward of the trunk."""

from __future__ import annotations

import torch
from torch import Tensor

from splitlearn.engine.batch_plan import BatchPlan
from splitlearn.engine.ready_step import ReadyStep
from splitlearn.engine.runner import Ran, Runner
from splitlearn.engine.session import Session


def run_batch(runner: Runner, batch: list[ReadyStep], dtype: torch.dtype) -> tuple[BatchPlan | None, Ran]:
    """Forward of the batch; a lone step without a session has no plan."""
    if batch[0].session is None:
        lone = batch[0].step.message
        return None, runner.run_without_cache(lone.activation_BTD, lone.mask_columns_BT, lone.positions_BT)
    sessions = [_session_of(member) for member in batch]
    plan = _plan_of(batch, runner.places([session.adapter for session in sessions]))
    first = sessions[0]
    pieces_BTD = [member.piece_of(member.step.message.activation_BTD) for member in batch]
    if any(piece_BTD.dtype != pieces_BTD[0].dtype for piece_BTD in pieces_BTD):
        pieces_BTD = [piece_BTD.to(dtype) for piece_BTD in pieces_BTD]
    ran = runner.run(
        plan,
        torch.cat(pieces_BTD) if len(batch) > 1 else pieces_BTD[0],
        _positions_of(batch),
        padded=any(session.padded for session in sessions),
        adapter=None if plan.mixed else first.adapter,
        autocast=first.precision.autocast,
    )
    return plan, ran


def _plan_of(batch: list[ReadyStep], places: tuple[int, ...]) -> BatchPlan:
    """`places` are the members' in the bank of adapters, if they have any."""
    sessions = [_session_of(member) for member in batch]
    return BatchPlan(
        steps=tuple(member.step.message.key.step for member in batch),
        step_rows=tuple(session.rows for session in sessions),
        slots=tuple(slot for session in sessions for slot in session.slots),
        lengths=tuple(member.length for member in batch for _ in _session_of(member).slots),
        tokens=batch[0].tokens,
        adapter_slots=tuple(
            place for session, place in zip(sessions, places, strict=False) for _ in session.slots
        ),
    )


def _positions_of(batch: list[ReadyStep]) -> Tensor | None:
    """None where every row's positions go on from its length."""
    if all(member.step.message.positions_BT is None for member in batch):
        return None
    return torch.cat([_row_positions(member) for member in batch])


def _row_positions(member: ReadyStep) -> Tensor:
    message = member.step.message
    if message.positions_BT is not None:
        return member.piece_of(message.positions_BT)
    start = member.length
    return torch.arange(start, start + member.tokens).expand(message.rows, member.tokens)


def _session_of(member: ReadyStep) -> Session:
    assert member.session is not None
    return member.session
