"""Names in `model` become versions of the store, at the moment of the request.

A tag that moves is followed by the next request, while those that run keep what they began with.
A version is held (`registry/holds.py`) from its first request until it has not been asked for in a
while, so that nobody removes it meanwhile. One that was removed later leaves the engine too.

SQLite and files are touched in threads; one of them owns the open store.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from tunefork.errors import StoreError
from tunefork.registry.holds import Hold
from tunefork.registry.names import Reference, parse_reference
from tunefork.registry.store import Store
from tunefork.registry.version import Version
from tunefork.serve.api.errors import ApiError, no_such_model, unavailable
from tunefork.serve.checks import Checked, Checks
from tunefork.serve.engine import Engine
from tunefork.serve.tenants import Tenant

_OWNER = "tunefork serve"
_MOST_REMEMBERED = 20_000
_LIST_AGE_S = 1.0
logger = logging.getLogger(__name__)


@dataclass
class _Entry:
    """A version in use."""

    checked: Checked
    hold: Hold
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)


class Lease:
    """A version for the time of one request; `release` it."""

    def __init__(self, entry: _Entry) -> None:
        self._entry: _Entry | None = entry
        self.checked = entry.checked
        entry.users += 1

    def release(self) -> None:
        """The request is over; idempotent."""
        if self._entry is not None:
            self._entry.users -= 1
            self._entry.last_used = time.monotonic()
            self._entry = None


@dataclass(frozen=True, slots=True)
class Listed:
    """A name that `model` may have."""

    id: str
    root: str
    """The exact version."""
    created: int
    """Seconds since 1970."""


class Adapters:
    """The store's adapters, as one server sees them; from one event loop."""

    def __init__(self, engine: Engine, checks: Checks, weights_sha256: str, base_name: str) -> None:
        self._engine, self._checks, self._weights = engine, checks, weights_sha256
        self._base_name = base_name
        self._store_thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._check_threads = ThreadPoolExecutor(2, thread_name_prefix="checks")
        self._store: Store | None = None
        self._entries: dict[str, _Entry] = {}
        self._verdicts: dict[str, Checked | ApiError] = {}
        self._listed: tuple[float, asyncio.Future[Sequence[Version]]] | None = None
        self._opening: dict[str, asyncio.Task[None]] = {}

    async def lease(self, model: str, tenant: Tenant, *, is_merged: bool = False) -> Lease:
        """The version that `model` means now. Raises ApiError: the same 404 for what does not
        exist and what is another tenant's; 400 for what cannot be served.

        `is_merged`: it gets an engine of its own.
        """
        reference = parse(model)
        if reference is None or not tenant.may_use(reference.name):
            raise no_such_model()
        try:
            version: Version = await self._in_store(self._resolve, model, reference)
        except StoreError as error:
            raise _told(error) from error
        name = str(version)
        while (entry := self._entries.get(name)) is None:
            task = self._opening.get(name)
            if task is None:
                task = self._opening[name] = asyncio.create_task(self._open(version, is_merged))
                task.add_done_callback(partial(self._was_opened, name))
            await asyncio.shield(task)
        return Lease(entry)

    async def all_of(self, tenant: Tenant) -> list[Listed]:
        """All names that `tenant` may ask for over this base."""
        versions = await self._versions()
        found: list[Listed] = []
        for index, version in enumerate(versions):
            if not tenant.may_use(version.name):
                continue
            created = int(datetime.fromisoformat(version.created).timestamp())
            is_last = index + 1 == len(versions) or versions[index + 1].name != version.name
            # The base's name is the base, also where an adapter is called so.
            ids = [version.name] if is_last and version.name != self._base_name else []
            ids += [f"{version.name}:{tag}" for tag in version.tags]
            found += [Listed(id, str(version), created) for id in [*ids, str(version)]]
        return found

    async def _versions(self) -> Sequence[Version]:
        """All adapters over this base, as of the last second."""
        now = time.monotonic()
        if self._listed is None or now - self._listed[0] > _LIST_AGE_S:
            reading = self._in_store(lambda: self._opened().adapters_of(self._weights))
            self._listed = (now, asyncio.ensure_future(reading))
        try:
            return await asyncio.shield(self._listed[1])
        except StoreError as error:
            raise _told(error) from error

    async def find(self, model: str, tenant: Tenant) -> Listed:
        """One of them, without loading it. Raises ApiError (404)."""
        for listed in await self.all_of(tenant):
            if listed.id == model:
                return listed
        raise no_such_model()

    async def sweep(self, idle_s: float) -> None:
        """Let go of what was not asked for in `idle_s`, and of what was removed from the store."""
        now = time.monotonic()
        for name, entry in list(self._entries.items()):
            if entry.users == 0 and now - entry.last_used >= idle_s:
                del self._entries[name]
                await self._in_store(entry.hold.release)
        state = self._engine.state()
        loaded = {*state.resident, *state.in_host_memory} - self._entries.keys()
        for name in await self._in_store(self._gone, sorted(loaded)):
            self._verdicts.pop(name, None)
            await self._engine.forget(name)

    async def close(self) -> None:
        """Release all holds."""
        for task in list(self._opening.values()):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
        for entry in self._entries.values():
            await self._in_store(entry.hold.release)
        self._entries.clear()
        if self._store is not None:
            await self._in_store(self._store.close)
        self._store_thread.shutdown()
        self._check_threads.shutdown()

    def in_use(self) -> int:
        """Versions that are held."""
        return len(self._entries)

    def _was_opened(self, name: str, task: "asyncio.Task[None]") -> None:
        self._opening.pop(name, None)
        if not task.cancelled():
            task.exception()  # is told to whoever waited for it, if anyone still did

    async def _open(self, version: Version, is_merged: bool) -> None:
        name = str(version)
        verdict = self._verdicts.get(name)
        if isinstance(verdict, ApiError):
            raise verdict
        try:
            hold: Hold = await self._in_store(lambda: self._opened().hold(version, _OWNER))
        except StoreError as error:
            raise _told(error) from error
        try:
            if verdict is None:
                verdict = await self._check(version, is_merged)
        except BaseException as error:
            await asyncio.shield(self._in_store(hold.release))
            if isinstance(error, ApiError) and error.status == 400:  # else it may pass
                self._remember(name, error)
            raise
        self._remember(name, verdict)
        self._entries[name] = _Entry(verdict, hold)

    async def _check(self, version: Version, is_merged: bool) -> Checked:
        details, folder = await self._in_store(
            lambda: (self._opened().show(version), version.folder())
        )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._check_threads,
            partial(self._checks.check, details, folder, is_merged=is_merged),
        )

    def _remember(self, name: str, verdict: Checked | ApiError) -> None:
        while len(self._verdicts) >= _MOST_REMEMBERED:
            self._verdicts.pop(next(iter(self._verdicts)))
        self._verdicts[name] = verdict

    def _opened(self) -> Store:
        if self._store is None:
            self._store = Store.open()
        return self._store

    def _resolve(self, model: str, reference: Reference) -> Version:
        version = self._opened().resolve(model)
        if version.name != reference.name:  # eight digits and more are a digest to the store
            raise StoreError("no such version")
        return version

    def _gone(self, names: list[str]) -> list[str]:
        gone = []
        for name in names:
            try:
                self._opened().resolve(name)
            except StoreError as error:
                if not _is_unusable(error):
                    gone.append(name)
        return gone

    async def _in_store(self, function: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._store_thread, function, *arguments)


def _told(error: StoreError) -> ApiError:
    """There is no such version; or nobody can say now, for which nobody should give up."""
    if not _is_unusable(error):
        return no_such_model()
    logger.error("%s", error)
    return unavailable("store_unusable", "The store of adapters cannot be read; try again", 5.0)


def _is_unusable(error: StoreError) -> bool:
    """Whether the store itself is at fault, and not what was asked of it."""
    return isinstance(error.__cause__, sqlite3.Error | OSError)


def parse(model: str) -> Reference | None:
    """`name`, `name:tag` or `name:vN`; None for what is no such name."""
    try:
        return parse_reference(model)
    except StoreError:
        return None
