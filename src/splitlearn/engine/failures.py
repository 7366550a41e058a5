"""What a step or a request that failed tells its client."""

from __future__ import annotations

import uuid

import structlog
import torch

from splitlearn.errors import ResourceExhausted, SplitLearnError, TrunkDraining, TrunkFailed

log = structlog.get_logger("splitlearn.engine")


def explained(error: Exception) -> SplitLearnError:
    """What a client is told; the cause of what nobody foresaw stays in the log."""
    if isinstance(error, SplitLearnError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return ResourceExhausted("the trunk's device ran out of memory at this step: use fewer rows")
    incident = uuid.uuid4().hex[:8]
    log.error("step failed", incident=incident, exc_info=error)
    return TrunkFailed(f"the trunk failed at this step; its log has the cause as incident {incident}")


def stopped() -> TrunkDraining:
    return TrunkDraining("the server stopped before this step ran: try another, or later")
