"""Adapters on their way from the disk through host memory into slots, and out again.

    disk -> host memory    read and checked by a thread; the least recently used is dropped first
    host memory -> slot    copied by a thread, on a stream of its own; the least recently used slot
                           that no running request computes with is taken

Nobody waits for a load but the requests that asked for it. Slots are granted in the order in which
adapters were first wanted. Where requests keep every slot in use, the one held longest (at least
for `PATIENCE_S`) takes no new requests any more once another adapter has waited for as long: it
empties, and goes over. So an adapter in demand cannot keep the others out, and no slot lies idle
meanwhile.

All of this runs in the engine's thread; the threads are in `loading.py`.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Callable

from tunefork.errors import NoAdapterMemoryError, TuneforkError
from tunefork.serve.engine import ServedAdapter
from tunefork.serve.engines.adapter_file import HostAdapter
from tunefork.serve.engines.loading import Loading
from tunefork.serve.engines.tier_entry import Entry, Slots, Stage

logger = logging.getLogger(__name__)

PATIENCE_S = 0.5


class Tiers:
    """Who is where."""

    def __init__(
        self,
        slots: Slots,
        read: Callable[[ServedAdapter], HostAdapter],
        *,
        host_memory_bytes: int,
        wake: Callable[[], None],
        clock: Callable[[], float],
        begin: Callable[[], None] | None = None,
    ) -> None:
        """See `Loading`."""
        self.slots, self.clock = slots, clock
        self.host_memory_bytes = host_memory_bytes
        self.entries: OrderedDict[str, Entry] = OrderedDict()  # least recently used first
        self.wanted: OrderedDict[str, float] = OrderedDict()
        """Adapters that a slot is wanted for, and since when."""
        self.pins: set[str] = set()
        """Ids that stay in their slots."""
        self.free = deque(range(slots.num_slots))
        self.loads, self.evictions = 0, 0
        self.load_seconds = {"read": 0.0, "copy": 0.0, "trial": 0.0}
        self.loading = Loading(slots, read, wake=wake, clock=clock, begin=begin)

    @property
    def resident(self) -> tuple[str, ...]:
        """Ids in slots that take requests."""
        return tuple(
            i
            for i, entry in self.entries.items()
            if entry.stage is Stage.IN_SLOT and not entry.is_draining
        )

    @property
    def in_host_memory(self) -> tuple[str, ...]:
        """Ids in host memory, those in slots too."""
        return tuple(i for i, entry in self.entries.items() if entry.host is not None)

    def ready(self, adapter: ServedAdapter) -> Entry | None:
        """The adapter's entry if it can be computed with now; else it is brought nearer."""
        entry = self.bring(adapter)
        if entry.stage is Stage.IN_SLOT and not entry.is_draining:
            return entry
        self.wanted.setdefault(adapter.id, self.clock())
        entry.is_awaited = False
        return None

    def prefetch(self, adapter: ServedAdapter) -> None:
        """A request for it is about to come: into a free slot, or at least into host memory."""
        entry = self.bring(adapter)
        if entry.stage is not Stage.IN_SLOT and self.free:
            self.wanted.setdefault(adapter.id, self.clock())
            entry.is_awaited = True

    def bring(self, adapter: ServedAdapter) -> Entry:
        """Begin to read the adapter, unless it is there."""
        entry = self.entries.get(adapter.id)
        if entry is None:
            entry = self.entries[adapter.id] = Entry(adapter, Stage.READING)
            self.loading.start(entry)
        self.entries.move_to_end(adapter.id)
        return entry

    def enter(self, entry: Entry) -> int:
        """A request begins to compute with it; its slot."""
        assert entry.slot is not None
        entry.users += 1
        return entry.slot

    def leave(self, adapter_id: str) -> None:
        """A request that had entered is over."""
        entry = self.entries[adapter_id]
        entry.users -= 1

    def pin(self, adapter: ServedAdapter, pinned: bool) -> None:
        """Keep it in a slot from now on, or no longer."""
        if not pinned:
            self.pins.discard(adapter.id)
            return
        self.pins.add(adapter.id)
        entry = self.bring(adapter)
        entry.is_forgotten = False
        if entry.stage is not Stage.IN_SLOT:
            self.wanted.setdefault(adapter.id, self.clock())

    def forget(self, adapter_id: str) -> None:
        """Drop it from every tier once no request uses it."""
        self.pins.discard(adapter_id)
        if adapter_id in self.entries:
            self.entries[adapter_id].is_forgotten = True

    def advance(self, waiting: set[str]) -> dict[str, TuneforkError]:
        """Take in what has arrived and grant slots; `waiting`: ids that queued requests name.

        Returns which loads have failed: it is for those that wait now. Who asks later tries again.
        """
        failures: dict[str, TuneforkError] = {}
        for entry, found, seconds in self.loading.arrived():
            self.load_seconds["read" if entry.stage is Stage.READING else "copy"] += seconds
            if isinstance(found, TuneforkError):
                failures[entry.adapter.id] = found
                self._give_up(entry, found)
            else:
                self._take_in(entry, found)
        for entry in [entry for entry in self.entries.values() if entry.is_forgotten]:
            if not entry.users and entry.adapter.id not in waiting:
                self.drop(entry)
        for adapter_id in list(self.wanted):
            awaited = self.entries.get(adapter_id)
            is_of_use = adapter_id in self.pins or adapter_id in waiting
            if awaited is None or not (is_of_use or awaited.is_awaited):
                del self.wanted[adapter_id]
        self._grant(waiting)
        self._trim_host(self.host_memory_bytes)
        return failures

    def close(self) -> None:
        """Stop loading, and forget everything. Slots are left as they are: so goes their bank."""
        self.loading.close()
        self.entries.clear()
        self.wanted.clear()

    def _grant(self, waiting: set[str]) -> None:
        """Slots for those that want one, in their order, as far as there are any."""
        draining = sum(entry.is_draining for entry in self.entries.values())
        now = self.clock()
        for adapter_id, since in list(self.wanted.items()):
            entry = self.entries.get(adapter_id)
            if entry is None:  # evicted just now, with no copy in host memory: it is read again
                del self.wanted[adapter_id]
                continue
            if entry.stage is Stage.IN_SLOT and not entry.is_draining:
                del self.wanted[adapter_id]
            if entry.stage is not Stage.HOST:
                continue
            if not self.free and entry.is_awaited:
                entry.is_awaited = False
                continue
            if not self.free and not self._evict_one(waiting):
                if draining == 0 and now - since > PATIENCE_S:
                    self._drain_one(now)
                draining = max(0, draining - 1)
                continue
            entry.slot, entry.stage = self.free.popleft(), Stage.MOVING
            entry.is_awaited = False
            del self.wanted[adapter_id]
            self.loading.start(entry)
        left = [self.entries[one] for one in self.wanted if one in self.entries]
        if all(entry.stage is not Stage.HOST for entry in left):
            for entry in self.entries.values():
                entry.is_draining = False  # whoever waited for its slot got another

    def _evict_one(self, waiting: set[str]) -> bool:
        """Free the slot of the least recently used adapter that nobody computes with.

        Nor is about to: one that has only just come would never be computed with otherwise.
        """
        for entry in self.entries.values():
            is_of_use = entry.users or entry.adapter.id in self.pins
            is_due = entry.adapter.id in waiting and not entry.is_draining
            if entry.stage is Stage.IN_SLOT and not is_of_use and not is_due:
                self._leave_slot(entry)
                self.evictions += 1
                return True
        return False

    def _drain_one(self, now: float) -> None:
        held = [
            entry
            for entry in self.entries.values()
            if entry.stage is Stage.IN_SLOT
            and entry.adapter.id not in self.pins
            and not entry.is_draining
            and now - entry.granted > PATIENCE_S
        ]
        if held:
            min(held, key=lambda entry: entry.granted).is_draining = True

    def _leave_slot(self, entry: Entry) -> None:
        assert entry.slot is not None
        self.slots.clear(entry.slot)
        self.free.append(entry.slot)
        entry.slot, entry.is_draining = None, False
        if entry.host is None:
            del self.entries[entry.adapter.id]
        else:
            entry.stage = Stage.HOST

    def drop(self, entry: Entry) -> None:
        """Out of every tier, unless a thread is at it; nobody computes with it."""
        if entry.stage in (Stage.READING, Stage.MOVING):
            return
        entry.host = None
        if entry.slot is not None:
            self._leave_slot(entry)
        self.entries.pop(entry.adapter.id, None)
        self.wanted.pop(entry.adapter.id, None)

    def _trim_host(self, most_bytes: int) -> None:
        held = sum(entry.host.num_bytes for entry in self.entries.values() if entry.host)
        for entry in list(self.entries.values()):
            if held <= most_bytes:
                return
            is_on_its_way = entry.stage is Stage.MOVING or entry.adapter.id in self.wanted
            if entry.host is None or is_on_its_way:
                continue
            held -= entry.host.num_bytes
            entry.host = None
            if entry.stage is Stage.HOST:
                del self.entries[entry.adapter.id]

    def _take_in(self, entry: Entry, found: HostAdapter | None) -> None:
        """What a thread has done with `entry`."""
        if entry.stage is Stage.READING:
            entry.host, entry.stage = found, Stage.HOST
        else:
            entry.stage, entry.granted = Stage.IN_SLOT, self.clock()
            self.loads += 1

    def _give_up(self, entry: Entry, error: TuneforkError) -> None:
        """A thread could not load it: what it held is free again."""
        if entry.adapter.id in self.pins:
            logger.error("pinned: %s; the next request for it tries again", error)
        if entry.stage is Stage.READING and isinstance(error, NoAdapterMemoryError):
            self._trim_host(0)
        entry.stage = Stage.HOST
        self.drop(entry)
