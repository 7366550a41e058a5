"""What is on the disk: there before going on, known again by its digest, claimed while it is written."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import xxhash

DIGEST_BYTES = 1 << 20


def cache_folder() -> Path:
    """Where this user keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "splitlearn"


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sizes_below(folder: Path) -> Iterator[tuple[Path, int]]:
    """Each file below a folder with its bytes; what comes and goes meanwhile may be missed."""
    # Unlike Path.rglob, it does not mind a folder that is gone before it is looked into.
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                file = Path(parent, name)
                yield file, file.stat().st_size


def make_folder(folder: Path) -> None:
    """The folder and those above it, their names on the disk. Raises FileExistsError where it is there."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True)
    for each in reversed(missing):
        sync(each.parent)


def append(file: Path, offset: int, lines: Sequence[str]) -> None:
    """Have these lines on the disk, from this byte of the file on; what stood there later is gone."""
    is_new = not file.exists()
    handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.ftruncate(handle, offset)
        os.lseek(handle, offset, os.SEEK_SET)
        with os.fdopen(os.dup(handle), "wb") as written:
            written.write("".join(f"{line}\n" for line in lines).encode())
        os.fsync(handle)
    finally:
        os.close(handle)
    if is_new:
        sync(file.parent)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Meanwhile the folder `is_claimed`, for other processes too; a process that is killed claims nothing."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Not every network's file system can: then nobody sees the claim.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def is_claimed(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def digest(file: Path) -> str:
    """Differs where the file's bytes do."""
    found = xxhash.xxh3_128()
    with file.open("rb") as content:
        while piece := content.read(DIGEST_BYTES):
            found.update(piece)
    return found.hexdigest()
