"""Tenants that always want more get equal shares, by tokens; idle capacity is nobody's."""

import asyncio
from collections import Counter

import pytest

from tunefork.serve.fair import FairQueue, QueueFullError, Turn


def _queue(running: int = 1, waiting: int = 100, per_tenant: int = 100) -> FairQueue:
    return FairQueue(running, waiting, per_tenant)


def _enter(queue: FairQueue, tenant: str, *tokens: int, weight: float = 1.0) -> list[Turn]:
    return queue.enter(tenant, weight, list(tokens) or [1])


Wants = dict[str, tuple[int, int, float]]


def _serve(
    queue: FairQueue, wants: Wants, rounds: int, turns: dict[Turn, str] | None = None
) -> Counter[str]:
    """Tokens served when each tenant (prompt, answer, weight) always has two requests waiting."""
    served: Counter[str] = Counter()
    turns = {} if turns is None else turns

    def refill() -> None:
        for tenant, (prompt, _, weight) in wants.items():
            while queue.waiting_by_tenant().get(tenant, 0) < 2:
                turns[queue.enter(tenant, weight, [prompt])[0]] = tenant

    for _ in range(rounds):
        refill()
        turn = next(turn for turn in turns if turn.granted.done())
        tenant = turns.pop(turn)
        prompt, answer, _ = wants[tenant]
        turn.charge(answer)
        served[tenant] += prompt + 2 * answer
        turn.leave()
    return served


def test_shares_are_equal_whatever_the_lengths() -> None:
    async def run() -> None:
        served = _serve(_queue(), {"long": (100, 200, 1.0), "short": (5, 10, 1.0)}, 2000)
        assert served["long"] == pytest.approx(served["short"], rel=0.05)

    asyncio.run(run())


def test_a_weight_of_two_gets_two_shares() -> None:
    async def run() -> None:
        served = _serve(_queue(), {"two": (10, 10, 2.0), "one": (10, 10, 1.0)}, 1000)
        assert served["two"] == pytest.approx(2 * served["one"], rel=0.05)

    asyncio.run(run())


def test_nobody_saves_up_service() -> None:
    async def run() -> None:
        queue = _queue()
        turns: dict[Turn, str] = {}
        _serve(queue, {"busy": (10, 50, 1.0)}, 200, turns)
        served = _serve(queue, {"busy": (10, 50, 1.0), "new": (10, 50, 1.0)}, 200, turns)
        assert served["new"] == pytest.approx(served["busy"], rel=0.05)

    asyncio.run(run())


def test_a_newcomer_is_lifted_to_what_the_last_one_was_served_since() -> None:
    async def run() -> None:
        queue = _queue(running=2)
        (turn,) = _enter(queue, "busy", 10)
        turn.charge(500)  # after it had nothing waiting any more
        _enter(queue, "new", 10)
        assert [lane.counter for lane in queue._lanes.values()] == [1010, 1020]

    asyncio.run(run())


def test_one_tenant_alone_has_all_the_room() -> None:
    async def run() -> None:
        queue = _queue(running=3)
        turns = _enter(queue, "a", 1, 1, 1, 1)
        assert [turn.granted.done() for turn in turns] == [True, True, True, False]
        turns[0].leave()
        assert turns[3].granted.done() and queue.running == 3
        for turn in turns:
            turn.leave()
            turn.leave()
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(run())


def test_one_that_gives_up_waiting_leaves_no_gap() -> None:
    async def run() -> None:
        queue = _queue()
        first, second, third = _enter(queue, "a", 1, 1, 1)
        second.leave()
        first.leave()
        assert third.granted.done() and not second.granted.done()
        third.leave()
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(run())


def test_a_full_queue_takes_all_or_nothing_and_says_when() -> None:
    async def run() -> None:
        queue = _queue(running=1, waiting=3, per_tenant=2)
        _enter(queue, "a", 1, 1)
        with pytest.raises(QueueFullError) as full:
            _enter(queue, "a", 1, 1)  # of two only one would fit into its lane
        assert 1.0 <= full.value.retry_after <= 60.0
        assert queue.waiting == 1
        _enter(queue, "b", 1, 1)
        with pytest.raises(QueueFullError):
            _enter(queue, "c", 1)

    asyncio.run(run())


def test_a_replicas_places_are_no_places_of_the_engine() -> None:
    async def run() -> None:
        queue, replica = _queue(running=1), object()
        queue.add_places(replica, 2)
        first, second = _enter(queue, "a"), _enter(queue, "a")
        assert first[0].granted.done() and not second[0].granted.done()
        merged = queue.enter("a", 1.0, [1, 1, 1], replica)
        assert [turn.granted.done() for turn in merged] == [True, True, False]
        assert (queue.running, queue.waiting) == (3, 2)
        first[0].leave()
        assert second[0].granted.done() and not merged[2].granted.done()
        merged[0].leave()
        assert merged[2].granted.done()

    asyncio.run(run())


def _with_slots(running: int, slots: int, resident: set[str]) -> FairQueue:
    return FairQueue(running, 100, 100, slots=slots, resident=lambda: resident)


def _granted(turns: list[Turn]) -> list[bool]:
    return [turn.granted.done() for turn in turns]


def test_answers_that_wait_for_a_slot_do_not_take_all_places() -> None:
    """One tenant holds the only slot and floods another adapter: the base is nobody's slot."""

    async def run() -> None:
        resident = {"a:v1"}
        queue = _with_slots(8, 1, resident)
        held = queue.enter("acme", 1.0, [1], adapter="a:v1")
        flood = queue.enter("acme", 1.0, [1] * 20, adapter="b:v1")
        assert _granted(held + flood) == [True, True] + 19 * [False]
        own = queue.enter("acme", 1.0, [1])
        other = queue.enter("beta", 1.0, [1, 1])
        third = queue.enter("beta", 1.0, [1], adapter="c:v1")  # one slot: one adapter may wait
        assert _granted(own + other + third) == [True, True, True, False]
        flood[0].leave()  # its client went away: the next may wait for the slot
        assert _granted(third + flood[1:]).count(True) == 1
        resident.add("b:v1")
        queue.look()
        assert queue.running == 8 and _granted(flood[1:]).count(True) in (3, 4)

    asyncio.run(run())


def test_the_others_for_an_adapter_follow_when_its_first_answer_begins() -> None:
    async def run() -> None:
        resident: set[str] = set()
        queue = _with_slots(8, 4, resident)
        for adapter in "xyz":
            turns = queue.enter("a", 1.0, [1, 1], adapter=adapter)
            assert _granted(turns) == [True, False]
            resident.add(adapter)
            turns[0].begins()
            turns[0].begins()
            assert _granted(turns) == [True, True]
            for turn in turns:
                turn.leave()
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(run())


def test_half_of_the_places_wait_for_slots_at_most() -> None:
    async def run() -> None:
        queue = _with_slots(4, 100, set())
        turns = [queue.enter("a", 1.0, [1], adapter=f"{at}:v1")[0] for at in range(4)]
        assert _granted(turns) == [True, True, False, False]
        assert _granted(queue.enter("b", 1.0, [1, 1, 1])) == [True, True, False]

    asyncio.run(run())
