"""A folder that a command writes: all of it is there, or nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splitlearn.errors import SettingError


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that appears under its name when all that is written within is there.

    Raises:
        SettingError: it has something in it, or cannot be written.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise SettingError(f"{output} is not empty; name a new folder, or remove it first")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        growing = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise SettingError(f"{output} cannot be written: {error}") from None
    try:
        yield growing
        growing.chmod(0o755)
        growing.replace(output)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
