"""A load over HTTP on the gateway with an engine that computes nothing."""

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.conftest import Call, tunefork
from tests.serve.fake_engine import FakeEngine, nothing
from tests.serve.servers import Running
from tunefork.errors import BadInputError
from tunefork.registry.store import Store
from tunefork.serve.bench import Load, Outcome, Sample, draw, run
from tunefork.serve.bench_report import quantile, report

__all__ = ["tunefork"]


def slow_engine(server: Running, delay_s: float) -> FakeEngine:
    engine = server.gateway.engine
    assert isinstance(engine, FakeEngine)
    engine.delay_s = delay_s
    return engine


def test_a_mix_is_sent_and_every_token_is_counted(server: Running, adapter: Path) -> None:
    with Store.open() as store:
        store.publish(adapter, "acme")
    engine = slow_engine(server, 0.002)
    load = Load(
        ("tiny-base", "acme"), requests=20, concurrency=5, prompt_tokens=(5, 30),
        answer_tokens=(3, 9), vocab_size=300,
    )  # fmt: skip
    told = report(server.url, load, asyncio.run(run(server.url, None, load)))
    asks = draw(load)
    assert told.errors == {}
    assert told.answered == 20
    assert told.output_tokens == sum(ask.max_tokens for ask in asks)
    assert told.requests_by_model.keys() == {"tiny-base", "acme"}
    assert sorted(one.prompt_ids for one in engine.seen) == sorted(ask.prompt for ask in asks)
    assert told.token_s is not None and told.first_token_s is not None
    assert told.token_s.p50 >= 0.002
    assert told.first_token_s.p50 <= told.first_token_s.p99


def test_arrivals_are_a_poisson_process_and_do_not_wait_for_answers(server: Running) -> None:
    engine, queue = slow_engine(server, 0.0), server.gateway.parts.queue

    def until_all_have_come(*_: object) -> bool:
        if queue.running + queue.waiting == 12:
            engine.holds = nothing
        return engine.holds is not nothing

    engine.holds = until_all_have_come
    load = Load(("tiny-base",), requests=12, rate=60.0, prompt_tokens=(4, 4), answer_tokens=(2, 2))
    load = replace(load, vocab_size=300)
    began = time.perf_counter()
    outcome = asyncio.run(asyncio.wait_for(run(server.url, None, load), 60))
    due = [ask.at_s for ask in draw(load)]
    sent = sorted(sample.sent - began for sample in outcome.samples)
    assert all(late > at for late, at in zip(sent, due, strict=True))


def test_the_same_seed_draws_the_same_and_skew_prefers_the_first() -> None:
    load = Load(tuple("abcd"), requests=400, skew=1.0, prompt_tokens=(1, 9), rate=3.0)
    assert draw(load) == draw(load) != draw(replace(load, seed=1))
    names = [ask.model for ask in draw(load)]
    assert names.count("a") > 1.5 * names.count("b") > 1.5 * names.count("d")
    mean = draw(load)[-1].at_s / 400
    assert mean == pytest.approx(1 / 3, rel=0.2)


def test_failures_are_counted_by_their_kind(server: Running) -> None:
    load = Load(("nobody", "tiny-base"), requests=6, prompt_tokens=(3, 3), answer_tokens=(2, 2))
    load = replace(load, vocab_size=300)
    told = report("", load, asyncio.run(run(server.url, None, load)))
    wrong = [ask.model for ask in draw(load)].count("nobody")
    [(kind, count)] = told.errors.items()
    assert count == wrong and kind.startswith("HTTP 404: The model does not exist")
    assert told.answered == 6 - wrong
    with pytest.raises(BadInputError, match=r"--server: nobody listens at http://127.0.0.1:1;"):
        asyncio.run(run("http://127.0.0.1:1", None, load))


def test_words_of_a_request_make_no_kind_of_its_own() -> None:
    refused = [Sample("a", 0.0, error=f"HTTP 429: {left} tokens left") for left in range(3)]
    outcome = Outcome([*refused, Sample("a", 0.0, error="timed out")], wall_s=1.0)
    told = report("", Load(("a",), requests=4), outcome)
    assert told.errors == {"HTTP 429: 0 tokens left": 3, "timed out": 1}


def test_the_verb_prints_a_table_or_json(server: Running, tunefork: Call) -> None:
    options = ["--server", server.url, "--model", "tiny-base", "--requests", 4, "--vocab-size", 300]
    options += ["--prompt-tokens", "4-8", "--answer-tokens", 3]
    ended = tunefork("bench-serve", *options)
    assert ended.status == 0, ended.err
    assert "4 of 4 requests answered" in ended.out
    assert "to the first token" in ended.out
    told = json.loads(tunefork("bench-serve", *options, "--json").out)
    assert told["output_tokens"] == 12
    assert told["load"]["prompt_tokens"] == [4, 8]
    wrong = tunefork("bench-serve", *options, "--prompt-tokens", "8-4")
    assert (wrong.status, "--prompt-tokens" in wrong.err) == (2, True)
    both = tunefork("bench-serve", *options, "--rate", 5, "--concurrency", 2)
    assert (both.status, "no use with --rate" in both.err) == (2, True)
    nobody = tunefork(
        "bench-serve", *options, "--model", "x", "--model", "y", "--key-env", "NO_SUCH"
    )
    assert (nobody.status, "NO_SUCH" in nobody.err) == (2, True)


def test_quantiles_lie_between_neighbours() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.95) == pytest.approx(9.5)
    assert quantile([7.0], 0.99) == 7.0
