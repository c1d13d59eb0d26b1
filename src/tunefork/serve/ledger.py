"""What was used, kept for billing: nothing that a client was told is complete is lost in a kill.

Records are written by a thread of their own, all that wait in one transaction, and a request's last
bytes are sent once its record is on the disk. The same transaction adds to the tenant's month, so
that the month's quota needs no other truth.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from tunefork.errors import StoreError
from tunefork.registry.database import writing
from tunefork.serve.database import as_store_error, connect

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Usage:
    """One request that was answered, or begun to be."""

    id: str
    """As the client was told it (`chatcmpl-...`)."""
    ended: str
    """ISO 8601, UTC."""
    tenant: str
    key_id: str | None
    endpoint: str
    model: str
    """The base's name, or the exact version `name:vN`."""
    end_user: str | None
    """What the request had as `user`."""
    status: str
    """`ok`, `cancelled` (the client went away), `deadline`, `refused` (the engine could not take
    what was asked) or `failed`."""
    choices: int
    prompt_tokens: int
    completion_tokens: int
    first_token_s: float | None
    total_s: float


class Ledger:
    """The open file; `record` from one event loop."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._months: dict[tuple[str, str], int] = {}
        self._queue: SimpleQueue[tuple[Usage, Future[None]] | None] = SimpleQueue()
        # All months, not the present one alone: a clock that is not set yet says another one.
        self._read("", ())
        self._thread = Thread(target=self._write, name="usage", daemon=True)
        self._thread.start()

    def refresh(self) -> None:
        """Heed what other servers with this file have recorded. Raises StoreError."""
        self._read("WHERE month = ?", (month(),))

    def _read(self, condition: str, values: tuple[str, ...]) -> None:
        database = connect(self._file)
        try:
            with as_store_error(self._file):
                asked = f"SELECT tenant, month, tokens FROM months {condition}"
                rows = database.execute(asked, values).fetchall()
        finally:
            database.close()
        for tenant, of_month, tokens in rows:
            if tokens > self._months.get((tenant, of_month), 0):
                self._months[tenant, of_month] = tokens

    def used_this_month(self, tenant: str) -> int:
        """Tokens that are on record."""
        return self._months.get((tenant, month()), 0)

    async def record(self, usage: Usage) -> None:
        """Returns once it is on the disk. Raises StoreError."""
        done: Future[None] = Future()
        self._queue.put((usage, done))
        await asyncio.wrap_future(done)

    def close(self) -> None:
        """Write what waits, and end."""
        self._queue.put(None)
        self._thread.join()

    def _write(self) -> None:
        database, identity = self._connected()
        is_open = True
        while is_open:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            is_open = None not in batch
            entries = [entry for entry in batch if entry is not None]
            try:
                if identity != _identity(self._file):
                    logger.error(
                        "%s: was replaced or removed while the server ran; usage goes to what is "
                        "there now, and what it held before is where that is kept",
                        self._file,
                    )
                    before = database
                    database, identity = self._connected()
                    before.close()
                self._insert(database, [usage for usage, _ in entries])
            except Exception as error:
                for _, done in entries:
                    done.set_exception(StoreError(f"usage cannot be recorded: {error}"))
                continue
            for _, done in entries:
                done.set_result(None)
        database.close()

    def _connected(self) -> tuple[sqlite3.Connection, tuple[int, int] | None]:
        return connect(self._file), _identity(self._file)

    def _insert(self, database: sqlite3.Connection, records: Sequence[Usage]) -> None:
        if not records:
            return
        totals: dict[tuple[str, str], int] = {}
        with as_store_error(self._file), writing(database):
            for usage in records:
                values = astuple(usage)
                marks = ", ".join("?" * (1 + len(values)))
                database.execute(f"INSERT INTO usage VALUES ({marks})", (None, *values))
                key = (usage.tenant, usage.ended[:7])
                (totals[key],) = database.execute(
                    "INSERT INTO months VALUES (?, ?, ?) ON CONFLICT DO UPDATE "
                    "SET tokens = tokens + excluded.tokens RETURNING tokens",
                    (*key, usage.prompt_tokens + usage.completion_tokens),
                ).fetchone()
        for month_of, tokens in totals.items():  # a file that took another's place knows of fewer
            self._months[month_of] = max(tokens, self._months.get(month_of, 0))


def _identity(file: Path) -> tuple[int, int] | None:
    """Which file lies there; None: none does."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What a tenant used of one model."""

    tenant: str
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


def read_usage(file: Path, *, tenant: str | None = None, since: str = "") -> list[UsageRow]:
    """Sums by tenant and model of what ended at `since` (ISO 8601, or its beginning) or later."""
    with as_store_error(file):
        database = connect(file)
        try:
            rows = database.execute(
                "SELECT tenant, model, count(*), sum(prompt_tokens), sum(completion_tokens) "
                "FROM usage WHERE ended >= ? AND (? IS NULL OR tenant = ?) "
                "GROUP BY tenant, model ORDER BY tenant, model",
                (since, tenant, tenant),
            )
            return [UsageRow(*row) for row in rows]
        finally:
            database.close()


def month() -> str:
    """The present one, as YYYY-MM in UTC."""
    return datetime.now(UTC).isoformat()[:7]
