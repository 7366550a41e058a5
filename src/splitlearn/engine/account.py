"""What each client holds of the trunk, against its quota; counted where it is taken."""

from __future__ import annotations

from weakref import WeakValueDictionary

from splitlearn.config import QuotaConfig
from splitlearn.errors import ResourceExhausted


class Account:
    """One client's. Belongs to the engine's thread."""

    def __init__(self, quota: QuotaConfig) -> None:
        self._max_sessions, self._max_bytes = quota.max_sessions, quota.max_bytes
        self.sessions = self.bytes = 0

    def open_session(self) -> None:
        """Raises ResourceExhausted where the client has as many as its quota allows."""
        if self._max_sessions is not None and self.sessions >= self._max_sessions:
            raise ResourceExhausted(
                f"you have {self.sessions} sessions open, your own quota on this server: "
                "close one (its cache, or the model), or ask the operator for more",
                facts={
                    "wanted_sessions": 1,
                    "held_sessions": self.sessions,
                    "limit_sessions": self._max_sessions,
                },
            )
        self.sessions += 1

    def close_session(self) -> None:
        self.sessions -= 1

    def require(self, bytes: int, what: str) -> None:
        """Raises ResourceExhausted where so many further bytes are more than the client's quota allows."""
        if self._max_bytes is not None and self.bytes + bytes > self._max_bytes:
            raise ResourceExhausted(
                f"{what} takes {bytes:,} bytes, you hold {self.bytes:,} of the {self._max_bytes:,} that are "
                "your own quota on this server: close sessions or runs, unload adapters, use fewer rows or a "
                "smaller rank, or ask the operator for more",
                facts={
                    "wanted_bytes": bytes,
                    "held_bytes": self.bytes,
                    "limit_bytes": self._max_bytes,
                },
            )

    def take(self, bytes: int, what: str) -> None:
        """Raises ResourceExhausted, and takes nothing, where that is more than the quota allows."""
        self.require(bytes, what)
        self.bytes += bytes

    def give_back(self, bytes: int) -> None:
        self.bytes -= bytes


def unlimited() -> Account:
    """Of nobody in particular."""
    return Account(QuotaConfig())


class Accounts:
    """An account lives as long as something counts in it: clients come and go, each under an id of its own.

    Belongs to the engine's thread.
    """

    def __init__(self, quota: QuotaConfig | None = None) -> None:
        self._quota = quota or QuotaConfig()
        self._accounts: WeakValueDictionary[bytes, Account] = WeakValueDictionary()

    def of(self, client: bytes) -> Account:
        account = self._accounts.get(client)
        if account is None:
            account = self._accounts[client] = Account(self._quota)
        return account
