"""Says now and then that a cohort's member is there, however long it computes between two steps."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import TYPE_CHECKING

from splitlearn.errors import SplitLearnError

if TYPE_CHECKING:
    from splitlearn.client.member_run import MemberRun

BEATS_A_LEASE = 3


class Heartbeat:
    """A thread that ends with its run, or when it is stopped."""

    def __init__(self, run: MemberRun, lease_s: float) -> None:
        self._run = weakref.ref(run)
        self._every_s = lease_s / BEATS_A_LEASE
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    @property
    def is_stopped(self) -> bool:
        return self._ended.is_set()

    def _beat(self) -> None:
        while not self._ended.wait(self._every_s):
            if (run := self._run()) is None:
                return
            # Whatever is wrong, the next step meets it, too, and can say so.
            with contextlib.suppress(SplitLearnError):
                run.say_that_it_is_there()
            del run
