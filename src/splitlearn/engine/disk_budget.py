"""What all runs may take on the disk together: a save without room is refused before anything is written."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splitlearn.disk import sizes_below
from splitlearn.errors import ResourceExhausted

NAMED = 3
"""So many of other models' folders are named, the largest first."""


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
            used = self._used()
            free = self._max_bytes - used.total()
            if needed > free:
                ours = folder.relative_to(self._folder).parts[0]
                raise ResourceExhausted(
                    f"{what} takes {needed:,} bytes on the server's disk, {max(free, 0):,} of "
                    f"{self._max_bytes:,} are free: it was not saved, what was saved before is still there. "
                    "Delete runs (`splitlearn runs HOST:PORT --delete NAME`), keep fewer checkpoints "
                    "(save_total_limit), or start the server with a larger --disk-budget"
                    f"{_elsewhere(used, ours)}",
                    facts={
                        "wanted_bytes": needed,
                        "free_bytes": max(free, 0),
                        "total_bytes": self._max_bytes,
                        "elsewhere_bytes": used.total() - used[ours],
                    },
                )
            self._being_written[folder] = needed
        try:
            yield
        finally:
            with self._lock:
                del self._being_written[folder]

    def _used(self) -> Counter[str]:
        """What is there, and what those who are writing now will take, by the first folder below ours."""
        size = Counter[str]()
        for folder, needed in self._being_written.items():
            size[folder.relative_to(self._folder).parts[0]] += needed
        for file, its_size in sizes_below(self._folder):
            if self._being_written.keys().isdisjoint(file.parents):
                size[file.relative_to(self._folder).parts[0]] += its_size
        return size


def _elsewhere(used: Counter[str], ours: str) -> str:
    """What no run of this server's model takes, which nobody can delete through it."""
    others = [(name, size) for name, size in used.most_common() if size and name != ours]
    if not others:
        return ""
    named = ", ".join(f"{size:,} in {name}" for name, size in others[:NAMED])
    more = f", and {len(others) - NAMED} more" if len(others) > NAMED else ""
    return (
        f". {sum(size for _, size in others):,} bytes of what is taken are not this model's ({named}{more}, "
        "in the server's --state-dir): delete their runs through a server of their model, or these folders"
    )
