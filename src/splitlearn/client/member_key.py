"""The secret by which a server knows a member again: a file of its own, which nobody else can read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from splitlearn.errors import SettingError
from splitlearn.wire.handshake import CLIENT_ID_BYTES


def client_key(file: str | Path | None) -> bytes:
    """The key in this file, which is made where there is none; without a file one for this process.

    Raises:
        SettingError: the file cannot be read or made, or holds something else.
    """
    if file is None:
        return secrets.token_bytes(CLIENT_ID_BYTES)
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_key(path)
    except OSError as error:
        raise SettingError(
            f"member key {path} cannot be made ({error.strerror}): name another file"
        ) from None
    key = secrets.token_bytes(CLIENT_ID_BYTES)
    with os.fdopen(handle, "w") as written:
        written.write(key.hex() + "\n")
    return key


def read_key(path: Path) -> bytes:
    """The key in a file that is there.

    Raises:
        SettingError: it cannot be read, or holds something else.
    """
    try:
        key = bytes.fromhex(path.read_text().strip())
    except OSError as error:
        raise SettingError(f"member key {path} cannot be read ({error.strerror})") from None
    except ValueError:
        key = b""
    if len(key) != CLIENT_ID_BYTES:
        raise SettingError(f"{path} holds no member key: name another file, or remove it to have one made")
    return key
