"""Whether a faster decode step may be used: its first ones are compared with the family's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from splitlearn.errors import first_line

PROOFS = 3
CLOSE = {2: 0.1, 4: 1e-3, 8: 1e-6}
"""How far apart, relative to the largest value, steps in a dtype of so many bytes may be."""


class FirstSteps:
    """A step that looks at the wrong columns is far off.

    Several are compared, because two experts whose scores tie may be chosen differently.

    Args:
        log: told once why the faster way is not used.
        let_go: frees what the faster way holds, once it is not used.
    """

    def __init__(self, log: Any, let_go: Callable[[], None]) -> None:
        self._log, self._let_go = log, let_go
        self._left = PROOFS
        self.proven = False
        """Whether a step gave what the family's own forward gives."""
        self.failed = False
        """Whether steps are the family's own from now on."""

    def compare(self, *pairs: tuple[Tensor, Tensor]) -> None:
        """Take one step into account: what it gave, and what the family's own forward gave.

        A step whose values are not finite, or all zero, says nothing: a client sends what it wants.
        """
        sizes = {theirs.dtype.itemsize for _, theirs in pairs}
        values = [(ours.float().cpu(), theirs.float().cpu()) for ours, theirs in pairs]
        if not all(theirs.isfinite().all() and theirs.any() for _, theirs in values):
            return
        apart = max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in values)
        self._left -= 1
        if apart <= CLOSE[min(sizes)]:
            self.proven = True
        elif not self._left:
            self.give_up(ValueError(f"a step differs from the family's own by {apart:.2g}"))

    def give_up(self, error: Exception) -> None:
        self.failed = True
        self._let_go()
        reason = first_line(error)
        self._log.warning(
            "decode steps run one kernel after another: they cannot be recorded here", error=reason
        )
