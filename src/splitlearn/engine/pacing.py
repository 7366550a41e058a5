"""Steps of clients that have had their quota of tokens or turns: they wait here before they wait in line."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from splitlearn.config import QuotaConfig
from splitlearn.engine.ready_step import Ready, ReadyStep
from splitlearn.engine.step import Step
from splitlearn.engine.turn_quota import TurnQuota
from splitlearn.errors import ResourceExhausted


@dataclass(slots=True)
class Purse:
    """One client's tokens: they come in at the quota's rate, up to a burst; a step may leave it in debt."""

    tokens: float
    at: float
    waiting: deque[Ready] = field(default_factory=deque)
    waiting_tokens: int = 0


class Pacing:
    """Belongs to the engine's thread; knows no clock but the times that it is told.

    Whose purse is not in debt goes on, whatever the size of the step, and pays for all of it. So a long
    prompt runs as fast as others' turns allow, and its client waits afterwards. One client's steps keep
    their order.
    """

    def __init__(self, quota: QuotaConfig) -> None:
        self._rate = quota.max_tokens_per_s or math.inf
        self._burst = quota.burst_tokens or self._rate
        self._purses: dict[bytes, Purse] = {}
        self._waiting = 0
        self._turns, self._counts_turns = TurnQuota(quota.turn_share), quota.turn_share is not None

    def __len__(self) -> int:
        return self._waiting + len(self._turns)

    def holds_back(self, ready: Ready, now: float) -> bool:
        """Whether the step has to wait here; one that has not is paid for.

        Raises:
            ResourceExhausted: it would wait for its tokens beyond its deadline.
        """
        return self._holds_for_tokens(ready, now) or self._turns.holds_back(ready, now)

    def holds_back_piece(self, ready: Ready, now: float) -> bool:
        """Whether a further piece of a step, which is paid for, has to wait here."""
        return self._turns.holds_back(ready, now)

    def ran(self, members: Iterable[ReadyStep], now: float) -> None:
        """A batch of decode steps is answered."""
        if self._counts_turns:
            self._turns.ran({member.step.client for member in members}, now)

    def _holds_for_tokens(self, ready: Ready, now: float) -> bool:
        if self._rate == math.inf:
            return False
        step = ready.step
        purse, tokens = self._purse_of(step.client, now), _tokens_of(step)
        if purse.tokens >= 0 and not purse.waiting:
            purse.tokens -= tokens
            return False
        if now + (wait_s := (purse.waiting_tokens - purse.tokens) / self._rate) > step.deadline:
            raise ResourceExhausted(
                f"a step of {tokens:,} tokens would wait {wait_s:.1f} s, longer than its deadline: your own "
                f"quota on this server is {self._rate:g} tokens/s. Ask again in {wait_s:.1f} s, or ask the "
                "operator for more",
                facts={
                    "wanted_tokens": tokens,
                    "held_tokens": math.floor(purse.tokens) - purse.waiting_tokens,
                    "limit_tokens_per_s": self._rate,
                    "retry_after_ms": math.ceil(wait_s * 1000),
                },
            )
        purse.waiting.append(ready)
        purse.waiting_tokens += tokens
        self._waiting += 1
        return True

    def released(self, now: float) -> Iterator[Ready]:
        """Those that need wait no longer, each paid for."""
        yield from self._turns.released(now)
        for client in [client for client, purse in self._purses.items() if purse.waiting]:
            purse = self._purse_of(client, now)
            while purse.waiting and purse.tokens >= 0:
                ready = purse.waiting.popleft()
                tokens = _tokens_of(ready.step)
                purse.tokens -= tokens
                purse.waiting_tokens -= tokens
                self._waiting -= 1
                if not self._turns.holds_back(ready, now):
                    yield ready

    def next_in_s(self, now: float, at_most: float) -> float:
        """When the next one is released."""
        due = (
            -self._purse_of(client, now).tokens / self._rate
            for client, purse in self._purses.items()
            if purse.waiting
        )
        return max(min(due, default=at_most), 0.0) if self._waiting else at_most

    def is_broke(self, client: bytes, now: float) -> bool:
        """Whether its next step would have to wait here."""
        purse = self._purses.get(client)
        return purse is not None and (bool(purse.waiting) or self._purse_of(client, now).tokens < 0)

    def take_out_where(self, wanted: Callable[[Ready], bool]) -> list[Ready]:
        gone = self._turns.take_out_where(wanted)
        from_turns = len(gone)
        for purse in self._purses.values():
            if found := [ready for ready in purse.waiting if wanted(ready)]:
                purse.waiting = deque(ready for ready in purse.waiting if ready not in found)
                purse.waiting_tokens -= sum(_tokens_of(ready.step) for ready in found)
                gone += found
        self._waiting -= len(gone) - from_turns
        return gone

    def forget_full(self, now: float) -> None:
        """Whose purse is full needs none: a new one is, too."""
        self._turns.forget_idle(now)
        for client in list(self._purses):
            purse = self._purse_of(client, now)
            if not purse.waiting and purse.tokens >= self._burst:
                del self._purses[client]

    def _purse_of(self, client: bytes, now: float) -> Purse:
        purse = self._purses.get(client)
        if purse is None:
            purse = self._purses[client] = Purse(self._burst, now)
        purse.tokens = min(purse.tokens + (now - purse.at) * self._rate, self._burst)
        purse.at = now
        return purse


def _tokens_of(step: Step[Any]) -> int:
    """Rows times new tokens; a step without a tensor counts as one token."""
    return max(step.message.rows * step.message.tokens, 1)
