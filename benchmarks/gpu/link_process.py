"""A link of limited speed: bytes pass from a port here to a server and back, each way at the link's pace."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from splitlearn.bench.worker import do_as_told

PIECE_BYTES = 1 << 17
RATE_S = 30.0
BURST_S = 3e-3
"""So much of what passed late is made up for, as sleeping is no more precise: 375 KB at 1 Gbit/s."""


class Pace:
    """One way of the link, shared by all connections over it."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, size: int) -> None:
        """Until the last of so many bytes has passed."""
        with self._lock:
            now = time.perf_counter()
            self._free_at = max(self._free_at, now - BURST_S) + size / self._bytes_per_s
            left = self._free_at - now
        if left > 0:
            time.sleep(left)


class LinkProcess:
    def open(self, address: str, bytes_per_s: float) -> str:
        """The address that stands for this one at the link's other end."""
        host, port = address.rsplit(":", 1)
        listener = socket.create_server(("127.0.0.1", 0))
        there, back = Pace(bytes_per_s), Pace(bytes_per_s)

        def accept() -> None:
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host.strip("[]"), int(port)))
                for source, target, pace in ((near, far, there), (far, near, back)):
                    target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=_pump, args=(source, target, pace), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def rate(self, bytes_per_s: float, size: int) -> float:
        """Bytes a second at which so many pass such a link, one way and back again."""
        with socket.create_server(("127.0.0.1", 0)) as server:

            def echo() -> None:
                connection, _ = server.accept()
                connection.sendall(_received(connection, size))

            threading.Thread(target=echo, daemon=True).start()
            host, port = self.open("{}:{}".format(*server.getsockname()), bytes_per_s).rsplit(":", 1)
            with socket.create_connection((host, int(port)), RATE_S) as connection:
                began = time.perf_counter()
                connection.sendall(bytes(size))
                _received(connection, size)
                return 2 * size / (time.perf_counter() - began)


def _received(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    got = 0
    while got < size:
        got += connection.recv_into(view[got:])
    return data


def _pump(source: socket.socket, target: socket.socket, pace: Pace) -> None:
    buffer = bytearray(PIECE_BYTES)
    view = memoryview(buffer)
    with contextlib.suppress(OSError):
        while size := source.recv_into(buffer):
            pace.wait(size)
            target.sendall(view[:size])
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    do_as_told(LinkProcess())
