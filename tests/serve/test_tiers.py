"""Who gets a slot, with neither files nor a model."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

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
