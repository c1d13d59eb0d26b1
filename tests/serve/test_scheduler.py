"""Who computes in a pass, and in which order."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from tests.serve.embedded import request
from tunefork.serve.engines.layout import BASE
from tunefork.serve.engines.regions import UNIT, Regions
from tunefork.serve.engines.scheduler import Scheduler
from tunefork.serve.engines.sequence import Sequence


def _running(scheduler: Scheduler, slot: int | None, *, tokens: int, computed: int) -> Sequence:
    wanted = request(str(len(scheduler.running)), [5] * tokens, max_tokens=100)
    unused: Any = None
    answer = Sequence(wanted, None, 0.0, unused, None, [5] * tokens, random.Random(0))
    answer.computed, answer.slot = computed, slot
    answer.region = scheduler.cache.regions.take(tokens)
    scheduler.running.append(answer)
    return answer


@pytest.mark.parametrize("has_prompt", [False, True])
def test_rows_come_in_the_order_of_their_slots_then_those_without_one_then_prompts(
    has_prompt: bool,
) -> None:
    """Also where one that was ready to decode gives its room up for another, so that the pass has
    as many parts as were ready, and a prompt among them."""
    cache: Any = SimpleNamespace(regions=Regions((1 + 5) * UNIT))
    scheduler = Scheduler(cache, None, max_requests=8, prefill_tokens=32)
    for slot in (None, 2):
        _running(scheduler, slot, tokens=10, computed=9)
    if has_prompt:
        _running(scheduler, 0, tokens=20, computed=0)
    grows = _running(scheduler, 3, tokens=10, computed=9)
    if has_prompt:
        _running(scheduler, 1, tokens=4, computed=3)  # ready first; last to come, so it gives way
        grows.tokens += [7] * UNIT
        grows.computed += UNIT
    slots = [part.slot for _, part in scheduler.plan()]
    assert slots == ([2, 3, BASE, 0] if has_prompt else [2, 3, BASE])
