"""Which adapters a vLLM server knows, and the load and unload calls that make it so.

vLLM keeps its own tiers: `--max-loras` adapters in slots, `--max-cpu-loras` in its memory, each by
what was used last; a name that left its memory is read from its folder again at its next use. A
name is known here for as long as it may be asked for; the least recently used one that no request
uses makes room. Three traps of vLLM's (read in lora/worker_manager.py and v1/core/kv_cache_utils.py
of 0.32) shape this file:

- a folder that is gone when vLLM reads it again ends the whole server: a child gets a folder of its
  own of each adapter, of links to the store's files, which outlives the store's;
- a load in place keeps the cached prefixes of what had the name before: a name is an id of the
  store, which is one content forever, and is never loaded over;
- it looks neither at the base of an adapter nor at what it does not know in its configuration: that
  is looked at here (`vllm_files.py`) and by the gateway.
"""

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from tunefork.errors import AdapterError, EngineBusyError, NoAdapterMemoryError, TuneforkError
from tunefork.serve.engine import ServedAdapter
from tunefork.serve.engines.vllm_files import check_config, link_folder

Call = Callable[[str, Mapping[str, Any]], Awaitable[tuple[int, str]]]
"""POSTs fields to a path of the server: status, and what it said."""

_FILES_STAY_S = 15.0
"""Seconds from the unloading of a name to the end of its files: vLLM may still end a request."""


@dataclass(slots=True)
class _Known:
    """One adapter of the server."""

    path: Path
    ready: "asyncio.Future[None]"
    users: int = 0
    pinned: bool = False
    forgotten: bool = False
    leaving: "asyncio.Task[None] | None" = None


@dataclass(slots=True)
class Adapters:
    """What a server knows; of one life of it, since a new one knows nothing."""

    call: Call
    capacity: int
    rank_step: int
    spool: Path | None
    """Folder for the server's view; None: the server reads the store's."""
    loads: int = 0
    evictions: int = 0
    load_seconds: float = 0.0
    _known: dict[str, _Known] = field(default_factory=dict)
    """The least recently used first."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _waiters: int = 0
    _tasks: "set[asyncio.Task[None]]" = field(default_factory=set)

    def ids(self) -> list[str]:
        """Of those that may be asked for, the most recently used first."""
        known = reversed(self._known.items())
        return [id for id, one in known if _succeeded(one.ready) and one.leaving is None]

    @asynccontextmanager
    async def using(self, adapter: ServedAdapter) -> AsyncIterator[str]:
        """The name under which the server knows `adapter`, which stays while it is used.

        Waits for a place where all are in use. Raises AdapterError where vLLM does not take it.
        """
        one = await self._take(adapter)
        try:
            await asyncio.shield(one.ready)
            yield adapter.id
        finally:
            one.users -= 1
            self._settle(adapter.id, one)

    async def bring(self, adapter: ServedAdapter, *, pinned: bool | None = None) -> None:
        """Load it, unless there is no place now; `pinned` says whether it may make room later."""
        if adapter.id not in self._known and not self._has_place():
            if pinned:
                raise EngineBusyError(f"{adapter.id}: all places hold adapters that are in use")
            return
        async with self.using(adapter):
            if pinned is not None:
                self._known[adapter.id].pinned = pinned

    def forget(self, adapter_id: str) -> None:
        """Unload it, and remove its files, once no request uses it."""
        one = self._known.get(adapter_id)
        if one is not None:
            one.forgotten, one.pinned = True, False
            self._settle(adapter_id, one)

    def adopt(self, served: Mapping[str, Path]) -> None:
        """Names that a server which was not started here already knows, with their folders."""
        for adapter_id, path in served.items():
            loaded = asyncio.get_running_loop().create_future()
            loaded.set_result(None)
            self._known[adapter_id] = _Known(path, loaded)

    async def unload_all(self) -> None:
        """Take every name from a server that goes on running."""
        for adapter_id in list(self._known):
            self._known[adapter_id].pinned = False
            self.forget(adapter_id)
        await self.close()

    async def close(self) -> None:
        """Wait for calls that run."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take(self, adapter: ServedAdapter) -> _Known:
        self._waiters += 1
        try:
            while (one := self._place(adapter)) is None:
                self._changed.clear()
                await self._changed.wait()
        finally:
            self._waiters -= 1
        one.users += 1
        one.forgotten = False
        self._known[adapter.id] = self._known.pop(adapter.id)  # used last
        return one

    def _place(self, adapter: ServedAdapter) -> _Known | None:
        """What is known of `adapter`, or a place for it; None: there is none yet."""
        one = self._known.get(adapter.id)
        if one is not None and one.path != self._path(adapter):
            raise AdapterError(
                f"{adapter.id}: the vLLM server has other files under this name; unload it there"
            )
        if one is not None:
            return one if one.leaving is None else None
        if len(self._known) >= self.capacity:
            self._evict()
            return None
        check_config(adapter, self.rank_step)
        one = _Known(self._path(adapter), self._start(self._load(adapter)))
        self._known[adapter.id] = one
        return one

    def _path(self, adapter: ServedAdapter) -> Path:
        if self.spool is None:
            return adapter.folder.absolute()
        return self.spool / sha256(adapter.id.encode()).hexdigest()[:24]

    def _has_place(self) -> bool:
        return len(self._known) < self.capacity or any(map(_is_idle, self._known.values()))

    def _evict(self) -> None:
        """Begin to unload the least recently used that is idle, but one for each that waits."""
        leaving = sum(one.leaving is not None for one in self._known.values())
        idle = next((id for id, one in self._known.items() if _is_idle(one)), None)
        if idle is not None and leaving < self._waiters:
            self.evictions += 1
            self._leave(idle, self._known[idle])

    def _settle(self, adapter_id: str, one: _Known) -> None:
        """After a change: what is forgotten leaves, and who waits may go on."""
        is_known = self._known.get(adapter_id) is one
        if is_known and one.forgotten and one.users == 0 and one.leaving is None:
            self._leave(adapter_id, one)
        self._changed.set()

    def _leave(self, adapter_id: str, one: _Known) -> None:
        one.leaving = self._start(self._unload(adapter_id, one))

    def _start(self, work: Any) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # is raised to those who wait for it; nobody may
        self._changed.set()

    async def _load(self, adapter: ServedAdapter) -> None:
        began = time.monotonic()
        try:
            path = self._path(adapter)
            if self.spool is not None:
                await asyncio.to_thread(link_folder, adapter.folder, path)
            fields = {"lora_name": adapter.id, "lora_path": str(path)}
            status, said = await self.call("/v1/load_lora_adapter", fields)
            if status != 200:
                raise _refused(adapter.id, said.replace(str(path), "its folder"))
        except BaseException:
            del self._known[adapter.id]  # the next request tries again
            raise
        self.loads += 1
        self.load_seconds += time.monotonic() - began

    async def _unload(self, adapter_id: str, one: _Known) -> None:
        await asyncio.wait([one.ready])
        if not _succeeded(one.ready):
            return
        with contextlib.suppress(TuneforkError):  # a server that is gone knows none
            await self.call("/v1/unload_lora_adapter", {"lora_name": adapter_id})
        del self._known[adapter_id]
        if one.forgotten and self.spool is not None:
            loop = asyncio.get_running_loop()
            loop.call_later(_FILES_STAY_S, self._remove_files, adapter_id, one.path)

    def _remove_files(self, adapter_id: str, path: Path) -> None:
        if adapter_id not in self._known:
            shutil.rmtree(path, ignore_errors=True)


def _refused(name: str, said: str) -> TuneforkError:
    """vLLM says 400 for whatever went wrong; a lack of memory is not the adapter's fault."""
    if "out of memory" in said.lower():
        return NoAdapterMemoryError(
            f"{name}: vLLM has no memory to load it: {said}; start the server with less "
            "vllm.slots or vllm.max_rank"
        )
    return AdapterError(f"{name}: vLLM does not load it: {said}")


def _is_idle(one: _Known) -> bool:
    return one.users == 0 and not one.pinned and one.leaving is None and one.ready.done()


def _succeeded(task: "asyncio.Future[None]") -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
