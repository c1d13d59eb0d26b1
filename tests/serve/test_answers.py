"""An answer that nobody takes is no longer computed; taken, it goes on; recorded once."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.serve.fake_engine import ALL, FakeEngine
from tunefork.errors import BadInputError, EngineBusyError
from tunefork.serve.answers import Answer
from tunefork.serve.api.errors import ApiError
from tunefork.serve.engine import EngineRequest, Piece, Sampling
from tunefork.serve.fair import FairQueue
from tunefork.serve.ledger import Ledger, read_usage
from tunefork.serve.metrics import Metrics
from tunefork.serve.order import Order
from tunefork.serve.parts import Parts
from tunefork.serve.quotas import Quotas
from tunefork.serve.tenants import Tenant

TENANT = Tenant("a", tokens_per_month=10_000)


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    ledger = Ledger(tmp_path / "serve.sqlite")
    yield Parts(FairQueue(4, 10, 10), Quotas(ledger), ledger, Metrics("base", 10, places=4))
    ledger.close()


def _order(engine: FakeEngine, *, max_tokens: int, choices: int = 1) -> Order:
    return Order(
        id="x",
        endpoint="completions",
        tenant=TENANT,
        key_id=None,
        model="m",
        engine=engine,
        adapter=None,
        prompts=((5, 6), (7,)),
        choices=choices,
        sampling=Sampling(max_tokens=max_tokens, ignore_eos=True),
        deadline=time.monotonic() + 10,
    )


async def _engine() -> FakeEngine:
    engine = FakeEngine(capabilities=replace(ALL, max_model_len=10_000))
    await engine.start()
    return engine


def test_an_answer_that_nobody_takes_is_no_longer_computed(parts: Parts, tmp_path: Path) -> None:
    async def run() -> None:
        engine = await _engine()
        answer = Answer(parts, _order(engine, max_tokens=1000))
        computed = -1
        while computed != engine.computed:
            computed = engine.computed
            await asyncio.sleep(0.05)
        assert 256 <= computed <= 260
        total = 0
        while (pieces := await answer.take()) is not None:
            total += sum(len(piece.token_ids) for _, piece in pieces)
        assert total == engine.computed == answer.completion_tokens == 2000
        await answer.finish()
        answer.abandon()
        await parts.settle()

    asyncio.run(run())
    (row,) = read_usage(tmp_path / "serve.sqlite")
    assert (row.requests, row.prompt_tokens, row.completion_tokens) == (1, 3, 2000)
    assert parts.quotas.left_this_month(TENANT) == 10_000 - 2003


def test_what_an_engine_had_ahead_is_billed(parts: Parts, tmp_path: Path) -> None:
    """A client that vanishes after its first token; the engine is 49 further."""

    class Ahead(FakeEngine):
        async def generate(self, request: EngineRequest) -> AsyncIterator[Piece]:
            request.meter.tokens = 50
            yield Piece("x", (5,))
            await asyncio.sleep(60)

    async def run() -> None:
        answer = Answer(parts, _order(Ahead(), max_tokens=1000))
        assert await answer.take()
        answer.abandon()
        await parts.settle()

    asyncio.run(run())
    (row,) = read_usage(tmp_path / "serve.sqlite")
    assert row.completion_tokens == 2 * 50
    assert parts.quotas.left_this_month(TENANT) == 10_000 - 103


def test_what_was_set_aside_is_given_back_however_it_ends(parts: Parts) -> None:
    async def run() -> None:
        engine = await _engine()
        engine.delay_s = 0.01
        answer = Answer(parts, _order(engine, max_tokens=100, choices=2))
        assert parts.quotas.left_this_month(TENANT) == 10_000 - 403
        assert await answer.take()
        answer.abandon()
        await parts.settle()
        used = answer.completion_tokens + answer.prompt_tokens
        assert parts.quotas.left_this_month(TENANT) == 10_000 - used and used < 100
        assert not engine.open and (parts.queue.running, parts.queue.waiting) == (0, 0)

    asyncio.run(run())


@pytest.mark.parametrize("error", [BadInputError("no such grammar"), EngineBusyError("full")])
def test_a_request_that_the_engine_refuses_is_billed_nothing(
    parts: Parts, tmp_path: Path, error: Exception
) -> None:
    tenant = replace(TENANT, tokens_per_minute=100)

    class Refuses(FakeEngine):
        async def generate(self, request: EngineRequest) -> AsyncIterator[Piece]:
            if request.id.endswith("-0"):
                raise error
            await asyncio.sleep(60)  # the other choices are cancelled before their first token
            yield Piece("x", (5,))

    async def run() -> None:
        order = replace(_order(Refuses(), max_tokens=10, choices=2), tenant=tenant)
        answer = Answer(parts, order)
        with pytest.raises(ApiError):
            await answer.take()
        answer.abandon()
        await parts.settle()

    asyncio.run(run())
    (row,) = read_usage(tmp_path / "serve.sqlite")
    assert (row.requests, row.prompt_tokens, row.completion_tokens) == (1, 0, 0)
    assert parts.quotas.left_this_month(tenant) == 10_000
    assert parts.quotas.headers(tenant)["x-ratelimit-remaining-tokens"] == "100"


def test_a_request_that_fails_later_is_billed_what_was_computed(
    parts: Parts, tmp_path: Path
) -> None:
    async def run() -> None:
        engine = await _engine()
        engine.fails = BadInputError("no token may follow")  # after the first one
        answer = Answer(parts, _order(engine, max_tokens=10))
        with pytest.raises(ApiError):
            while await answer.take():
                pass
        answer.abandon()
        await parts.settle()

    asyncio.run(run())
    (row,) = read_usage(tmp_path / "serve.sqlite")
    assert row.prompt_tokens == 3 and row.completion_tokens >= 1
