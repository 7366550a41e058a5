"""What is on the disk: had there before going on, and known again by its digest."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

DIGEST_BYTES = 1 << 20


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(file: Path) -> str:
    """Differs where the file's bytes do."""
    found = xxhash.xxh3_128()
    with file.open("rb") as content:
        while piece := content.read(DIGEST_BYTES):
            found.update(piece)
    return found.hexdigest()
