"""One process of a load: its sessions, each stepping as fast as its answers come."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Iterable
from typing import Any

from splitlearn.bench.batches import Answered
from splitlearn.bench.latencies import Latencies
from splitlearn.bench.replayed_session import Replay, ReplayedSession
from splitlearn.bench.worker import do_as_told
from splitlearn.client.calls import describe
from splitlearn.config import ClientConfig
from splitlearn.errors import SplitLearnError, TrunkUnreachable
from splitlearn.wire.generated import splitlearn_pb2 as pb

SAMPLE = 20_000
"""Answers of which each one is noted, to tell the batches from."""
PAUSE_S = 0.1


class LoadWorker:
    """Between two calls the sessions stay open and idle."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._sessions: list[ReplayedSession] = []

    def open(self, address: str, prompts: list[int], text_tokens: int) -> None:
        """A session for each prompt, of so many tokens."""
        facts = describe(address, ClientConfig().connect_s)
        replays = (Replay(tokens, text_tokens) for tokens in prompts)
        self._sessions = [ReplayedSession(address, facts, replay) for replay in replays]
        self._loop.run_until_complete(_side_by_side(session.open() for session in self._sessions))

    def run(self, warm_up_s: float, seconds: float) -> dict[str, Any]:
        """What was answered after the warm-up."""
        tally = Tally(time.perf_counter() + warm_up_s, seconds)
        self._loop.run_until_complete(_side_by_side(drive(each, tally) for each in self._sessions))
        return tally.told()

    def close(self) -> None:
        self._loop.run_until_complete(_side_by_side(session.close() for session in self._sessions))


class Tally:
    """What is counted between `since` and `until`."""

    def __init__(self, since: float, seconds: float) -> None:
        self.since, self.until = since, since + seconds
        self._latencies = Latencies()
        self._errors: Counter[str] = Counter()
        self._device_us = self._queued_us = 0
        self._sample: list[Answered] = []
        self._processor_s = 0.0

    def note(self, session: int, began: float, answer: pb.Answer) -> None:
        now = time.perf_counter()
        if not self.since <= now <= self.until:
            return
        self._processor_s = self._processor_s or time.process_time()
        timings = answer.timings
        self._latencies.note(now - began)
        self._device_us += timings.device_us
        self._queued_us += timings.queued_us
        if len(self._sample) < SAMPLE:
            self._sample.append(Answered(now, session, timings.device_us))

    def note_error(self, error: SplitLearnError) -> None:
        """At any time: an error while warming up is one, too."""
        self._errors[type(error).__name__] += 1

    def told(self) -> dict[str, Any]:
        return {
            "latencies": self._latencies.counts,
            "errors": self._errors,
            "device_us": self._device_us,
            "queued_us": self._queued_us,
            "sample": self._sample,
            "processor_s": time.process_time() - self._processor_s if self._processor_s else 0.0,
        }


async def drive(session: ReplayedSession, tally: Tally) -> None:
    """Step after step until the time is up; after an error in a new session, if the connection holds."""
    while (began := time.perf_counter()) < tally.until:
        try:
            if session.is_lost:
                await session.reopen()
            tally.note(session.number, began, await session.step())
        except TrunkUnreachable as error:
            tally.note_error(error)
            return
        except SplitLearnError as error:
            tally.note_error(error)
            session.is_lost = True
            await asyncio.sleep(PAUSE_S)


async def _side_by_side(those: Iterable[Awaitable[None]]) -> None:
    await asyncio.gather(*those)


if __name__ == "__main__":
    do_as_told(LoadWorker())
