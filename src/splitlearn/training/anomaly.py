"""Gradients that are not what gradients should be: seen by their norm, before either side has moved."""

from __future__ import annotations

import logging
import math
import statistics
from collections import Counter, deque
from dataclasses import dataclass

from splitlearn.config import AnomalyConfig

log = logging.getLogger("splitlearn")
NOT_FINITE, SPIKE, VANISHED = "not_finite", "spike", "vanished"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What both sides do with this step: move by `rate` times the learning rate, or not at all."""

    kind: str = ""
    skip: bool = False
    stop: bool = False
    rate: float = 1.0


class AnomalyWatch:
    """Compares each step's gradient norm with the median of those before it."""

    def __init__(self, config: AnomalyConfig) -> None:
        self._config = config
        self._norms: deque[float] = deque(maxlen=config.window)
        self._slow_left = 0
        self.seen: Counter[str] = Counter()
        """How often each kind was met."""

    def judge(self, norm: float, step: int) -> Verdict:
        """What to do with a step whose gradients have this norm, over the whole model."""
        kind = self._kind(norm)
        if kind:
            self.seen[kind] += 1
            return self._act(kind, norm, step)
        self._norms.append(norm)
        if self._slow_left:
            self._slow_left -= 1
            return Verdict(rate=self._config.slow_factor)
        return Verdict()

    def _kind(self, norm: float) -> str:
        config = self._config
        if not math.isfinite(norm):
            return NOT_FINITE
        can_tell = config.spike_factor and len(self._norms) >= config.min_history
        if can_tell and norm > config.spike_factor * statistics.median(self._norms):
            return SPIKE
        return VANISHED if norm < config.vanishing_norm else ""

    def _act(self, kind: str, norm: float, step: int) -> Verdict:
        action = self._config.action
        # A gradient that is no number cannot be taken in smaller steps.
        if action == "slow" and kind == NOT_FINITE:
            action = "skip"
        log.warning("step %d: gradient norm %.3g (%s): %s", step, norm, kind, _SAID[action])
        if action == "slow":
            self._slow_left = self._config.slow_steps
            return Verdict(kind, rate=self._config.slow_factor)
        return Verdict(kind, skip=True, stop=action == "stop")


_SAID = {
    "skip": "the step is skipped on both sides",
    "slow": "the learning rate is lowered for a while on both sides",
    "stop": "the step is skipped on both sides, and training stops with a checkpoint",
}
