"""Who gets a slot, with neither files nor a model."""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, cast

import pytest

from tunefork.errors import NoAdapterMemoryError
from tunefork.serve.engine import ServedAdapter
from tunefork.serve.engines.adapter_file import HostAdapter
from tunefork.serve.engines.tiers import Tiers

A, B = (ServedAdapter(name, Path(), rank=4, bytes=10) for name in ("a:v1", "b:v1"))


class _Slots:
    num_slots = 1

    def load(self, slot: int, adapter: HostAdapter) -> None:
        """There is nothing to copy."""

    def clear(self, slot: int) -> None:
        """Nor to forget."""


class _Host:
    num_bytes = 10
    rank = 4


def test_one_that_is_evicted_while_it_is_wanted_again_is_read_again() -> None:
    now = 0.0
    tiers = Tiers(
        _Slots(),
        lambda _: cast("Any", _Host()),
        host_memory_bytes=5,  # less than one: a copy is dropped as soon as it is in its slot
        wake=lambda: None,
        clock=lambda: now,
    )

    def until(is_so: Callable[[], object], *wanted: ServedAdapter) -> None:
        nonlocal now
        patience_ends = time.monotonic() + 60
        while time.monotonic() < patience_ends:
            tiers.advance({adapter.id for adapter in wanted})
            for adapter in wanted:
                tiers.ready(adapter)
            if is_so():
                return
            now += 0.3
            time.sleep(0.002)
        raise AssertionError("it never came to that")

    until(lambda: A.id in tiers.resident, A)
    held = tiers.entries[A.id]
    tiers.enter(held)
    until(lambda: held.is_draining, B)
    assert held.host is None
    tiers.ready(A)  # a new request for the one that is to go, behind the other's
    tiers.leave(A.id)
    until(lambda: B.id in tiers.resident, A, B)
    until(lambda: A.id in tiers.resident, A)
    tiers.close()


def test_who_cannot_be_read_for_want_of_memory_finds_more_at_the_next_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Copies of others, which can be read again, are dropped; a pin holds all the same."""
    has_room = False

    def read(adapter: ServedAdapter) -> Any:
        if adapter is B and not has_room:
            raise MemoryError
        return _Host()

    tiers = Tiers(_Slots(), read, host_memory_bytes=100, wake=lambda: None, clock=time.monotonic)
    monkeypatch.setattr(Thread, "start", None)  # nor can a thread begin any more

    def until(is_so: Callable[[dict[str, Any]], object]) -> None:
        for _ in range(200):
            if is_so(tiers.advance(set())):
                return
            time.sleep(0.002)
        raise AssertionError("it never came to that")

    tiers.prefetch(A)
    until(lambda _: A.id in tiers.resident)
    assert tiers.in_host_memory == (A.id,)
    tiers.pin(B, True)
    until(lambda failures: isinstance(failures.get(B.id), NoAdapterMemoryError))
    assert tiers.resident == (A.id,) and not tiers.in_host_memory
    assert tiers.advance({B.id}) == {}  # who asks now was not told of that
    has_room = True
    tiers.ready(B)
    until(lambda _: B.id in tiers.resident)
    assert not tiers._evict_one(set())
    tiers.close()


def test_one_that_was_to_go_stays_where_whoever_waited_got_another_slot() -> None:
    """Else it would answer nobody until somebody wants its slot again."""
    now = 0.0
    slots, c = _Slots(), ServedAdapter("c:v1", Path(), rank=4, bytes=10)
    slots.num_slots = 2
    tiers = Tiers(
        slots,
        lambda _: cast("Any", _Host()),
        host_memory_bytes=100,
        wake=lambda: None,
        clock=lambda: now,
    )

    def until(is_so: Callable[[], object], *wanted: ServedAdapter) -> None:
        nonlocal now
        patience_ends = time.monotonic() + 60
        while time.monotonic() < patience_ends:
            tiers.advance({adapter.id for adapter in wanted})
            for adapter in wanted:
                tiers.ready(adapter)
            if is_so():
                return
            now += 0.3
            time.sleep(0.002)
        raise AssertionError("it never came to that")

    until(lambda: len(tiers.resident) == 2, A, B)
    tiers.enter(tiers.entries[A.id])
    tiers.enter(tiers.entries[B.id])
    tiers.entries[B.id].granted = now  # the other is held longer
    until(lambda: tiers.entries[A.id].is_draining, c)
    tiers.leave(B.id)
    until(lambda: c.id in tiers.resident, c)
    tiers.advance({A.id})
    assert tiers.ready(A) is tiers.entries[A.id]
    tiers.close()
