"""A trunk server in a process of its own, ready once its `listening on` line came."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

from splitlearn.errors import TrunkUnreachable

READY = "listening on "
START_S = 180.0
STOP_S = 45.0


class TrunkProcess:
    """`splitlearn serve` on one CPU thread and a free port; a context manager.

    Args:
        model: folder or hub id.
        options: further options of `splitlearn serve`.
        log: file that its log is written to; by default one that goes with the process.

    Raises (on entry):
        TrunkUnreachable: it ended, or was not ready in time; with the last line that it wrote.
    """

    def __init__(self, model: str | Path, *options: str, log: Path | None = None) -> None:
        self._log_file = log
        self._command = [sys.executable, "-m", "splitlearn.cli", "serve", str(model), "--port", "0", *options]
        self.address = ""

    @property
    def id(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+") if self._log_file is None else self._log_file.open("w+")
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            self.address = self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def require_alive(self) -> None:
        """Raises TrunkUnreachable, with the last line that it wrote, where it has ended."""
        if self._process.poll() is not None:
            raise TrunkUnreachable(
                f"the trunk server ended with exit code {self._process.returncode}: {self._last_words()}"
            )

    def stop(self) -> int:
        """Drain it as an operator would; its exit code."""
        self._process.terminate()
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._log.close()

    def _wait_until_ready(self) -> str:
        lines: SimpleQueue[str] = SimpleQueue()
        threading.Thread(target=lambda: lines.put(self._first_line()), daemon=True).start()
        try:
            line = lines.get(timeout=START_S)
        except Empty:
            raise TrunkUnreachable(f"the trunk server was not ready within {START_S:g} s") from None
        if not line.startswith(READY):
            raise TrunkUnreachable(f"the trunk server ended before it was ready: {self._last_words()}")
        return line.removeprefix(READY).strip()

    def _first_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines() or ["it said nothing"]
        return lines[-1].removeprefix("error: ")
