"""Threads that bring adapters one step nearer: from the disk to host memory, from there to a slot.

The engine's thread says what is to be loaded, and takes in what has arrived.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from tunefork.errors import EngineError, NoAdapterMemoryError, TuneforkError
from tunefork.serve.engine import ServedAdapter
from tunefork.serve.engines.adapter_file import HostAdapter
from tunefork.serve.engines.tier_entry import Entry, Slots, Stage
from tunefork.train.out_of_memory import is_out_of_memory

_THREADS = 2
"""So that one adapter can be read while another is copied."""
Arrival = tuple[Entry, HostAdapter | TuneforkError | None, float]
"""What was loaded, what came of it (None: it is in its slot), and how many seconds it took."""


class Loading:
    """The threads, and what has arrived."""

    def __init__(
        self,
        slots: Slots,
        read: Callable[[ServedAdapter], HostAdapter],
        *,
        wake: Callable[[], None],
        clock: Callable[[], float],
        begin: Callable[[], None] | None,
    ) -> None:
        """`wake` is called from threads when something has arrived, `begin` by each thread before
        anything else."""
        self.slots, self.read, self.wake, self.clock = slots, read, wake, clock
        self._arrived: deque[Arrival] = deque()
        self._threads = ThreadPoolExecutor(_THREADS, "tunefork-adapters", initializer=begin)
        # All of them now: where memory is short, a thread that cannot begin ends the engine.
        together = Barrier(_THREADS, timeout=10.0)
        for begun in [self._threads.submit(together.wait) for _ in range(_THREADS)]:
            begun.result()

    def start(self, entry: Entry) -> None:
        """Load it; its stage says which step is due."""
        self._threads.submit(self._load, entry)

    def arrived(self) -> Iterator[Arrival]:
        """What has come since the last time."""
        while self._arrived:
            yield self._arrived.popleft()

    def close(self) -> None:
        """Begin no more, and wait for what was begun."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._arrived.clear()

    def _load(self, entry: Entry) -> None:
        began = self.clock()
        found: HostAdapter | TuneforkError | None = None
        try:
            if entry.stage is Stage.READING:
                found = self.read(entry.adapter)
            else:
                assert entry.slot is not None and entry.host is not None
                self.slots.load(entry.slot, entry.host)
        except TuneforkError as error:
            found = _bare(error)
        except Exception as error:  # whatever it is, its requests must not wait for ever
            found = _explained(entry, error)
        self._arrived.append((entry, found, self.clock() - began))
        self.wake()


def _bare(error: TuneforkError) -> TuneforkError:
    """Without tracebacks, its causes' too: they hold what was loaded."""
    one: BaseException | None = error
    while one is not None:
        one = one.with_traceback(None).__cause__
    return error


def _explained(entry: Entry, error: Exception) -> TuneforkError:
    """For the log; without the error itself, whose traceback holds what was loaded."""
    name = entry.adapter.id
    if not is_out_of_memory(error):
        return EngineError(f"{name}: cannot be loaded: {type(error).__name__}: {error}"[:500])
    if entry.stage is Stage.READING:
        return NoAdapterMemoryError(
            f"{name}: out of memory while it was read; start the server with less "
            "embedded.host_memory_bytes (where a CPU computes: or less embedded.cache_tokens)"
        )
    return NoAdapterMemoryError(
        f"{name}: out of memory while it was copied into its slot; start the server with less "
        "embedded.cache_tokens, or fewer embedded.slots"
    )
