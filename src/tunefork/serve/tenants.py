"""Who asks: tenants, their keys, what they may see and how much they may use.

A key is `tf_<id>_<secret>` with 256 random bits of secret; kept of it is the SHA-256, which for a
random secret is as good as a slow hash. It is shown once. A tenant sees the adapters whose names
match one of its patterns; `*` in a pattern is any text, also with `/` in it.
"""

import hashlib
import hmac
import json
import re
import secrets
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from tunefork.errors import BadInputError, nearest
from tunefork.registry.database import writing
from tunefork.serve.database import as_store_error, connect

_KEY = re.compile(r"tf_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NO_HASH = "0" * 64


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whoever has keys of their own. Limits: None is none."""

    name: str
    models: tuple[str, ...] = ("*",)
    """Patterns of names of adapters."""
    has_base: bool = True
    """May ask the base as it is."""
    is_operator: bool = False
    """May read /metrics, which tell of all tenants."""
    weight: float = 1.0
    """Share of the engine where tenants compete, in proportion."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_month: int | None = None
    """Prompt and answer, calendar month of UTC."""

    def may_use(self, name: str) -> bool:
        """Whether the adapters called `name` are this tenant's."""
        return any(fnmatchcase(name, pattern) for pattern in self.models)


LOCAL = Tenant("local", is_operator=True)
"""Everyone, where no key is demanded."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret."""

    id: str
    tenant: str
    created: str
    revoked: str | None


@dataclass(frozen=True, slots=True)
class Accounts:
    """Tenants and live keys, as they were when the file was read."""

    tenants: dict[str, Tenant]
    hashes: dict[str, tuple[str, str]]
    """Key id -> (SHA-256, tenant)."""

    def find(self, key: str) -> tuple[Tenant, str] | None:
        """The tenant and the key's id; None for a key that is none, in the same time."""
        match = _KEY.fullmatch(key)
        key_id = match[1] if match else ""
        known, tenant = self.hashes.get(key_id, (_NO_HASH, ""))
        is_right = hmac.compare_digest(_sha256(key), known)
        return (self.tenants[tenant], key_id) if is_right and tenant else None


def read_accounts(file: Path) -> Accounts:
    """All tenants and the keys that are not revoked. Raises StoreError."""
    with as_store_error(file):
        database = connect(file)
        try:
            tenants = [_tenant(row) for row in database.execute("SELECT * FROM tenants")]
            keys = database.execute("SELECT id, sha256, tenant FROM keys WHERE revoked IS NULL")
            hashes = {row["id"]: (row["sha256"], row["tenant"]) for row in keys}
        finally:
            database.close()
    return Accounts({tenant.name: tenant for tenant in tenants}, hashes)


def add_key(file: Path, tenant: Tenant) -> str:
    """A new key of `tenant`, which is made or changed to what is given. Returned only once."""
    if not _NAME.fullmatch(tenant.name):
        raise BadInputError(
            f"{tenant.name!r} is no name for a tenant: 1 to 64 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or a digit"
        )
    if tenant.name == LOCAL.name:
        raise BadInputError(
            f"{tenant.name!r} stands for whoever asks a server without keys; give the tenant "
            "another name"
        )
    if "" in tenant.models:  # of a shell's variable that is not set, say
        raise BadInputError("--models: a pattern is empty; '*' is every adapter, 'none' is none")
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    key = f"tf_{key_id}_{secret}"
    values = (
        *(tenant.name, json.dumps(tenant.models), tenant.has_base, tenant.is_operator),
        *(tenant.weight, tenant.requests_per_minute, tenant.tokens_per_minute),
        tenant.tokens_per_month,
    )
    with as_store_error(file):
        database = connect(file)
        try:
            with writing(database):
                marks = ", ".join("?" * len(values))
                names = "models, has_base, is_operator, weight, requests_per_minute, "
                names += "tokens_per_minute, tokens_per_month"
                changes = ", ".join(f"{n} = excluded.{n}" for n in names.split(", "))
                database.execute(
                    f"INSERT INTO tenants (name, {names}) VALUES ({marks}) "
                    f"ON CONFLICT (name) DO UPDATE SET {changes}",
                    values,
                )
                database.execute(
                    "INSERT INTO keys VALUES (?, ?, ?, ?, NULL)",
                    (key_id, tenant.name, _sha256(key), _now()),
                )
        finally:
            database.close()
    return key


def find_tenant(file: Path, name: str) -> Tenant | None:
    """The tenant called `name`, if there is one."""
    return read_accounts(file).tenants.get(name)


def list_keys(file: Path) -> list[Key]:
    """All keys, revoked ones too, in the order of their making."""
    with as_store_error(file):
        database = connect(file)
        try:
            rows = database.execute("SELECT id, tenant, created, revoked FROM keys ORDER BY rowid")
            return [Key(*row) for row in rows]
        finally:
            database.close()


def revoke_key(file: Path, key_id: str) -> Key:
    """End a key, by its id; a running server heeds it within a second. Raises BadInputError."""
    with as_store_error(file):
        database = connect(file)
        try:
            with writing(database):
                known = [row[0] for row in database.execute("SELECT id FROM keys")]
                if key_id not in known:
                    raise BadInputError(
                        f"no key has this id{nearest(key_id, known) if len(key_id) < 20 else ''}; "
                        "tunefork serve keys list shows the ids (a key is tf_<id>_<secret>)"
                    )
                database.execute(
                    "UPDATE keys SET revoked = coalesce(revoked, ?) WHERE id = ?", (_now(), key_id)
                )
                row = database.execute(
                    "SELECT id, tenant, created, revoked FROM keys WHERE id = ?", (key_id,)
                ).fetchone()
        finally:
            database.close()
    return Key(*row)


def _tenant(row: sqlite3.Row) -> Tenant:
    fields = dict(row)
    return Tenant(
        **fields
        | {
            "models": tuple(json.loads(fields["models"])),
            "has_base": bool(fields["has_base"]),
            "is_operator": bool(fields["is_operator"]),
        }
    )


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
