"""Who may come in: how many streams at once, and nobody new while the server stops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from splitlearn.errors import ResourceExhausted, TrunkDraining


class Admission:
    """Counts the open streams; belongs to the event loop's thread."""

    def __init__(self, max_streams: int) -> None:
        self._max_streams = max_streams
        self._streams = 0
        self._draining = False

    @property
    def is_draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        self._draining = True

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A place for one stream.

        Raises:
            TrunkDraining: the server is stopping; ResourceExhausted: all places are taken.
        """
        if self._draining:
            raise TrunkDraining("the server is stopping and takes no new client: try another, or later")
        if self._streams >= self._max_streams:
            raise ResourceExhausted(
                f"{self._streams} streams are open, this server allows {self._max_streams}: try again later",
                facts={"streams": self._streams, "max_streams": self._max_streams},
            )
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1
