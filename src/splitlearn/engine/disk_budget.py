"""What all runs may take on the disk together: a save without room is refused before anything is written."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splitlearn.errors import ResourceExhausted


class DiskBudget:
    """Counts all that lies below a folder. Called by any thread."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._being_written: dict[Path, int] = {}

    @contextmanager
    def reserved(self, folder: Path, needed: int, what: str) -> Iterator[None]:
        """Room for what is about to be written below `folder`, which other saves then do not have.

        Raises:
            ResourceExhausted: there is not so much left for `what`.
        """
        with self._lock:
            free = self._max_bytes - self._used()
            if needed > free:
                raise ResourceExhausted(
                    f"{what} takes {needed:,} bytes on the server's disk, {max(free, 0):,} of "
                    f"{self._max_bytes:,} are free: it was not saved, what was saved before is still there. "
                    "Delete runs (`splitlearn runs HOST:PORT --delete NAME`), keep fewer checkpoints "
                    "(save_total_limit), or start the server with a larger --disk-budget",
                    facts={
                        "wanted_bytes": needed,
                        "free_bytes": max(free, 0),
                        "total_bytes": self._max_bytes,
                    },
                )
            self._being_written[folder] = needed
        try:
            yield
        finally:
            with self._lock:
                del self._being_written[folder]

    def _used(self) -> int:
        """What is there, and what those who are writing now will take."""
        size = sum(self._being_written.values())
        for file in self._folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if file.is_file() and self._being_written.keys().isdisjoint(file.parents):
                    size += file.stat().st_size
        return size
