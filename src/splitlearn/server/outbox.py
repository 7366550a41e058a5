"""What is to leave for one client: in order on its stream, and what is in pieces over its lanes too."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from splitlearn.wire.chunks import Pieces
from splitlearn.wire.generated import splitlearn_pb2 as pb

Content = pb.ServerMessage | Pieces


class Outbox:
    """Belongs to the event loop's thread.

    Connections take from it as they have room; nothing waits for one of them. So what is held for a client is
    what it was not yet sent, however slowly it reads which connection.

    Args:
        settled: called once for each answer, when every connection has sent what it took of it.
    """

    def __init__(self, settled: Callable[[], None]) -> None:
        self.settled = settled
        self.waiting: deque[Leaving] = deque()
        self.has_ended = False
        self._news = asyncio.Event()

    def put(self, content: Content, *, is_answer: bool) -> None:
        """Behind what is here; nothing after the end."""
        if not self.has_ended:
            self.waiting.append(Leaving(content, is_answer))
            self.wake()

    def end(self) -> None:
        """What is here is the last."""
        self.has_ended = True
        self.wake()

    def wake(self) -> None:
        """Have all connections look again."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def news(self) -> None:
        await self._news.wait()


class Leaving:
    """A message on its way, which several connections may have taken pieces of."""

    def __init__(self, content: Content, is_answer: bool) -> None:
        self.content, self.is_answer = content, is_answer
        self.is_all_taken = False
        self.takers = 0


class Exit:
    """One connection's way out of the outbox; a lane takes pieces only."""

    def __init__(self, outbox: Outbox, *, is_lane: bool = False) -> None:
        self._outbox = outbox
        self._is_lane = is_lane
        self._taken: Leaving | None = None
        self._is_shut = False

    async def take(self) -> pb.ServerMessage | bytes | None:
        """What this connection sends next, None at the end; what it took before has been sent."""
        self.leave()
        while not self._is_shut:
            if (found := self._find()) is not None:
                return found
            if self._outbox.has_ended and not self._is_lane:
                return None
            await self._outbox.news()
        return None

    def shut(self) -> None:
        """Take nothing more."""
        self._is_shut = True
        self._outbox.wake()

    def leave(self) -> None:
        """What this connection took has been sent, or never will be."""
        if (taken := self._taken) is not None:
            self._taken = None
            taken.takers -= 1
            self._settle_if_out(taken)

    def _find(self) -> pb.ServerMessage | bytes | None:
        """The first that this connection may take, or a piece of it."""
        waiting = self._outbox.waiting
        found: pb.ServerMessage | bytes | None
        for leaving in tuple(waiting):
            if isinstance(leaving.content, Pieces):
                found = leaving.content.take()
                leaving.is_all_taken = found is None
            elif self._is_lane:
                continue
            else:
                found, leaving.is_all_taken = leaving.content, True
            if leaving.is_all_taken:
                waiting.remove(leaving)
            if found is not None:
                self._taken = leaving
                leaving.takers += 1
                return found
            self._settle_if_out(leaving)
        return None

    def _settle_if_out(self, leaving: Leaving) -> None:
        if leaving.is_answer and leaving.is_all_taken and not leaving.takers:
            self._outbox.settled()
