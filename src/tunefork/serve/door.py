"""Who asks: a request's key, against the tenants' file as it was a second ago.

Without keys a server on the loopback interface is open to everyone on this machine; with the first
key it closes, and never opens again while it runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunefork.serve.api.errors import ApiError
from tunefork.serve.tenants import LOCAL, Accounts, Tenant, read_accounts


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is."""

    tenant: Tenant
    key_id: str | None


class Door:
    """One server's."""

    def __init__(self, file: Path, *, may_be_open: bool) -> None:
        self.is_open = False
        """No key is demanded. Not before the file was read: there may be keys in it."""
        self._file, self._may_be_open = file, may_be_open
        self._accounts = Accounts({}, {})

    def read(self) -> None:
        """Heed what changed in the file; in a thread. Raises StoreError."""
        self._accounts = read_accounts(self._file)
        self._may_be_open = self._may_be_open and not self._accounts.tenants
        self.is_open = self._may_be_open

    def identify(self, headers: Mapping[str, str]) -> Caller:
        """Who asks. Raises ApiError (401)."""
        if self.is_open:
            return Caller(LOCAL, None)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        found = self._accounts.find(key.strip()) if scheme.lower() == "bearer" else None
        if found is None:
            raise ApiError(
                401,
                "No valid API key was given; send one as Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        return Caller(*found)

    def is_operator(self, headers: Mapping[str, str]) -> bool:
        """Whether an operator asks."""
        try:
            return self.identify(headers).tenant.is_operator
        except ApiError:
            return False
