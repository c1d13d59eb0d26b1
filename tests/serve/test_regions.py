"""Regions of the cache: never two over one token, and all of it comes back."""

import random
from itertools import pairwise

from tunefork.serve.engines.regions import UNIT, Region, Regions


def test_regions_never_overlap_and_all_come_back() -> None:
    chosen, regions = random.Random(0), Regions(64 * UNIT)
    held: list[Region] = []
    for _ in range(2000):
        if held and chosen.random() < 0.5:
            regions.give(held.pop(chosen.randrange(len(held))))
        elif held and chosen.random() < 0.3:
            at = chosen.randrange(len(held))
            grown = regions.grow(held[at], held[at].size + chosen.randrange(1, 2 * UNIT))
            held[at] = grown or held[at]
        elif (taken := regions.take(chosen.randrange(1, 9 * UNIT))) is not None:
            held.append(taken)
        spans = sorted((region.start, region.start + region.size) for region in held)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert all(start >= UNIT and end <= 64 * UNIT for start, end in spans)
        assert regions.free == regions.total - sum(region.size for region in held)
    for region in held:
        regions.give(region)
    assert regions.take(regions.total) == Region(UNIT, regions.total)


def test_growing_keeps_the_start_and_stops_at_a_neighbour() -> None:
    regions = Regions(8 * UNIT)
    first, second = regions.take(UNIT), regions.take(UNIT)
    assert first is not None and second is not None
    assert regions.grow(first, UNIT + 1) is None
    assert regions.grow(first, UNIT) == first
    regions.give(second)
    assert regions.grow(first, UNIT + 1) == Region(first.start, 2 * UNIT)
