"""Bytes as people write and read them: `2GiB`, `512 MiB`, `1000`; 4.61 kB, 30.2 MB."""

from __future__ import annotations

import re

BINARY = {"": 1, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}
DECIMAL = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_WRITTEN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]I?)?B?", re.IGNORECASE)


def parse_bytes(written: str) -> int:
    """`2GiB` is 2 * 2**30, `2GB` is 2 * 10**9, a bare number is bytes.

    Raises:
        ValueError: it is none of these, or no byte at all.
    """
    found = _WRITTEN.fullmatch(written.strip())
    size = int(float(found[1]) * (BINARY | DECIMAL)[(found[2] or "").upper()]) if found else 0
    if size < 1:
        raise ValueError(f"{written!r} is not a size; write for example 2GiB, 512MiB or a number of bytes")
    return size


def show_bytes(size: float) -> str:
    """Three digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
