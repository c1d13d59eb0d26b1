"""What one request may ask of the embedded engine, beside others, and how it ends."""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.serve.embedded import (
    answer,
    answers,
    base_folder,
    held_after,
    idle,
    request,
    settings,
    started,
    until,
)
from tunefork.errors import (
    BadInputError,
    EngineBusyError,
    EngineDeadError,
    EngineError,
    NoMemoryError,
)
from tunefork.serve.engine import Piece
from tunefork.serve.engines import core, sequence
from tunefork.serve.engines.cache import Cache
from tunefork.serve.engines.choose import log_probabilities
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.scheduler import Scheduler

PROMPT = [20, 60, 100, 140, 180, 220]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("requests") / "base"
    model = base_folder(folder)
    model.folder = folder
    return model


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def test_a_seed_gives_the_same_answer_whatever_else_is_in_the_batch(base: Any) -> None:
    wanted = request("a", PROMPT, temperature=1.5, top_p=0.9, seed=7, max_tokens=24)
    others = [
        request(f"o{at}", PROMPT[at % 6 :] + PROMPT, temperature=1.0, seed=at, max_tokens=9)
        for at in range(7)
    ]

    async def compare() -> None:
        async with started(base.folder) as engine:
            alone = await answer(engine, wanted)
            among = (await answers(engine, [*others, wanted]))[-1]
            assert among.token_ids == alone.token_ids
            other = request("b", PROMPT, temperature=1.5, top_p=0.9, seed=8, max_tokens=24)
            assert (await answer(engine, other)).token_ids != alone.token_ids
            unseeded = request("c", PROMPT, temperature=1.5, max_tokens=24)
            both = await answers(
                engine, [unseeded, request("d", PROMPT, temperature=1.5, max_tokens=24)]
            )
            assert both[0].token_ids != both[1].token_ids

    run(compare())


def test_stop_ids_stop_texts_and_length(base: Any) -> None:
    drawn: dict[str, Any] = {"max_tokens": 16, "temperature": 1.0, "seed": 5}

    async def ask() -> None:
        async with started(base.folder) as engine:
            whole = await answer(engine, request("a", PROMPT, **drawn))
            tokens = whole.token_ids
            assert (len(tokens), whole.finish_reason) == (16, "length")
            at = next(i for i in range(6, 16) if tokens[i] not in tokens[:i])
            by_id = await answer(engine, request("b", PROMPT, stop_ids=(tokens[at],), **drawn))
            assert (by_id.token_ids, by_id.finish_reason) == (tokens[: at + 1], "stop")
            assert whole.text.startswith(by_id.text) and len(by_id.text) < len(whole.text)
            stop = whole.text[len(whole.text) // 2 :][:2]
            by_text = await answer(engine, request("c", PROMPT, stop=(stop,), **drawn))
            assert by_text.finish_reason == "stop"
            assert by_text.text == whole.text[: whole.text.index(stop)]

    run(ask())


def test_logprobs_are_those_of_the_base(base: Any) -> None:
    async def ask() -> None:
        async with started(base.folder) as engine:
            wanted = [
                request("a", PROMPT, max_tokens=4, logprobs=3),
                request("b", PROMPT, max_tokens=4),
                request("c", PROMPT, max_tokens=4, logprobs=0, temperature=1.0, seed=1),
            ]
            with_top, without, sampled = await answers(engine, wanted)
            assert without.logprobs == ()
            assert [one.top for one in sampled.logprobs] == [()] * 4
            for piece in (with_top, sampled):
                ids = torch.tensor([PROMPT + list(piece.token_ids)])
                with torch.no_grad():
                    expected = base(ids).logits[0].log_softmax(-1)
                for at, told in enumerate(piece.logprobs):
                    row = expected[len(PROMPT) - 1 + at]
                    assert told.token_id == piece.token_ids[at]
                    assert told.logprob == pytest.approx(float(row[told.token_id]), abs=1e-4)
                    best = row.topk(3).indices.tolist()[: len(told.top)]
                    assert [token for token, _, _ in told.top] == best

    run(ask())


def test_penalties_and_bias_change_what_is_likeliest(base: Any) -> None:
    async def ask() -> None:
        async with started(base.folder) as engine:
            plain, biased, penalised = await answers(
                engine,
                [
                    request("a", PROMPT, max_tokens=20),
                    request("b", PROMPT, max_tokens=5, logit_bias={33: 100.0}),
                    request(
                        "c", PROMPT, max_tokens=20, presence_penalty=2.0, frequency_penalty=2.0
                    ),
                ],
            )
            assert biased.token_ids == (33,) * 5
            assert len(set(penalised.token_ids)) > len(set(plain.token_ids))

    run(ask())


def test_clients_that_vanish_leave_nothing_behind(base: Any) -> None:
    """200 that read one piece and go, some before their first; others are answered."""

    async def vanish(engine: EmbeddedEngine, at: int) -> None:
        stream = engine.generate(request(f"v{at}", PROMPT * (1 + at % 5), max_tokens=100))
        if at % 4 == 0:
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            await anext(stream)
        await stream.aclose()

    async def ask() -> None:
        async with started(base.folder, max_requests=32) as engine:
            stays = asyncio.ensure_future(answer(engine, request("s", PROMPT, max_tokens=60)))
            await asyncio.gather(*(vanish(engine, at) for at in range(200)))
            assert len((await stays).token_ids) == 60
            await idle(engine)

    run(ask())


def test_a_deadline_ends_running_and_waiting_requests(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> None:
        async with started(base.folder, max_requests=1) as engine:
            assert engine._parts is not None
            passes, seconds = engine._parts.core.passes, 0
            compute = passes.run

            def run(parts: Any, follows: Any = None) -> Any:
                nonlocal seconds
                seconds += 1  # a pass
                return compute(parts, follows)

            monkeypatch.setattr(passes, "run", run)
            monkeypatch.setattr(core, "time", SimpleNamespace(monotonic=lambda: seconds))
            wanted = [request(name, PROMPT, max_tokens=240, deadline=5.0) for name in "ab"]
            found = await answers(engine, wanted)
            assert [one.finish_reason for one in found] == ["deadline", "deadline"]
            assert len(found[0].token_ids) == 5
            assert found[1].token_ids == ()

    run(ask())


def test_a_full_cache_puts_the_last_ones_off_and_changes_no_answer(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regions grow where they lie, move, and are given up and computed again."""
    happened: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any) -> Any:
            happened[name] += 1
            return original(*args)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(sequence, "HEADROOM", 8)
    counted(Scheduler, "_put_back")
    counted(Cache, "move")
    wanted = [request(f"{at}", PROMPT[at % 6 :] + PROMPT, max_tokens=90) for at in range(6)]

    async def ask(**embedded: Any) -> list[Any]:
        async with started(base.folder, **embedded) as engine:
            return [piece.token_ids for piece in await answers(engine, wanted)]

    roomy = run(ask())
    moved = happened["move"]
    assert not happened["_put_back"] and moved
    assert run(ask(cache_tokens=6 * 64)) == roomy
    assert happened["_put_back"]


def test_what_does_not_fit_is_refused_at_once(base: Any) -> None:
    async def ask() -> None:
        few = {"max_requests": 1, "max_queued": 1, "cache_tokens": 300}  # of which regions have 192
        async with started(base.folder, **few) as engine:
            for wrong in (
                request("a", PROMPT, max_tokens=193 - len(PROMPT)),
                request("b", [], max_tokens=1),
                request("c", [5, 10**6], max_tokens=1),
                request("d", PROMPT, logit_bias={10**6: 1.0}),
            ):
                with pytest.raises(BadInputError):
                    await answer(engine, wrong)
            streams = [
                engine.generate(request(f"q{at}", PROMPT, max_tokens=150)) for at in range(3)
            ]
            await anext(streams[0])
            waiting = asyncio.ensure_future(anext(streams[1]))
            await asyncio.sleep(0)
            with pytest.raises(EngineBusyError):
                await anext(streams[2])
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            for stream in streams:
                await stream.aclose()

    run(ask())


def test_a_request_whose_logits_are_not_finite_fails_alone(base: Any) -> None:
    async def ask() -> None:
        async with started(base.folder) as engine:
            assert engine._parts is not None
            passes = engine._parts.core.passes
            original = passes._pass

            def spoiled(*args: Any) -> Any:
                outcome = original(*args)
                tensors = passes.layout.tensors
                last = tensors["last"][: len(outcome.tokens_r)].long()
                outcome.tokens_r[tensors["ids"][last] == 77] = -1
                return outcome

            passes._pass = spoiled  # type: ignore[method-assign, assignment]
            sick = asyncio.ensure_future(answer(engine, request("a", [5, 77])))
            well = await answer(engine, request("b", PROMPT))
            assert len(well.token_ids) == 8
            with pytest.raises(EngineError, match="not finite"):
                await sick

    run(ask())


def test_a_pass_without_memory_costs_the_largest_request_alone(base: Any) -> None:
    async def ask() -> None:
        async with started(base.folder) as engine:
            assert engine._parts is not None
            passes = engine._parts.core.passes
            original = passes.run

            def short(parts: Any, follows: Any = None) -> Any:
                if sum(len(part.ids) for part in parts) > 100:
                    torch.empty(1 << 50)  # what a CPU's allocator says of it is no exception's name
                return original(parts, follows)

            passes.run = short  # type: ignore[method-assign]
            small = asyncio.ensure_future(answer(engine, request("a", PROMPT, max_tokens=30)))
            with pytest.raises(NoMemoryError, match="out of memory in a pass"):
                await answer(engine, request("b", PROMPT * 30, max_tokens=5))
            assert len((await small).token_ids) == 30

    run(ask())


def test_what_an_answers_choice_or_text_fails_with_is_its_own(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for log probabilities, a grammar, a tokenizer."""
    choice = sequence.Sequence.choice

    def short(*told: Any) -> Any:
        torch.empty(1 << 50) if told[2] == 7 else None
        return log_probabilities(*told)

    def lost(answer: Any) -> Any:
        if answer.request.id == "grammar" and answer.num_answered == 2:
            raise ValueError("lexer")
        return choice(answer)

    def silent(*_: Any) -> str:
        raise KeyError("no such token")

    monkeypatch.setattr("tunefork.serve.engines.telling.log_probabilities", short)
    monkeypatch.setattr(sequence.Sequence, "choice", lost)

    async def ask() -> None:
        async with started(base.folder) as engine:
            alone = await answer(engine, request("w", PROMPT, temperature=1.0, seed=3))
            stream = engine.generate(request("text", PROMPT, max_tokens=100))
            await anext(stream)
            assert engine._parts is not None
            [running] = engine._parts.core.scheduler.running
            monkeypatch.setattr(running.detokenizer, "push", silent)
            with pytest.raises(EngineError, match="its text"):
                async for _ in stream:
                    pass
            wanted = [
                request("w2", PROMPT, temperature=1.0, seed=3),
                request("grammar", PROMPT, presence_penalty=0.1),
                request("memory", PROMPT * 2, logprobs=7),
            ]
            found = await asyncio.gather(
                *(answer(engine, one) for one in wanted), return_exceptions=True
            )
            assert isinstance(found[0], Piece) and found[0].token_ids == alone.token_ids
            assert [str(one).split(":")[0][:13] for one in found[1:]] == [
                "its grammar c",
                "out of memory",
            ]

    run(ask())


def test_what_was_computed_before_an_error_is_told_and_all_of_it_is_metered(base: Any) -> None:
    async def ask() -> None:
        async with started(base.folder) as engine:
            may_go_on = held_after(engine, 8)
            wanted = request("a", PROMPT, max_tokens=200)
            stream = engine.generate(wanted)
            first = await anext(stream)
            await until(lambda: wanted.meter.tokens == 8)  # nobody reads
            assert engine._parts is not None
            engine._parts.core.passes.run = None  # type: ignore[assignment, method-assign]
            may_go_on.set()
            told = len(first.token_ids)
            with pytest.raises(EngineDeadError):
                async for piece in stream:
                    told += len(piece.token_ids)
            assert told == wanted.meter.tokens in (8, 9)  # with the pass that was under way
            await engine.start()
            vanishing = request("b", PROMPT, max_tokens=200)
            stream = engine.generate(vanishing)
            await anext(stream)
            while vanishing.meter.tokens < 5:
                await asyncio.sleep(0.01)
            await stream.aclose()

    run(ask())


def test_an_answer_that_was_complete_when_the_engine_died_is_told(base: Any) -> None:
    """Texts are made while the next pass computes, or fails."""

    async def ask() -> None:
        async with started(base.folder) as engine:
            assert engine._parts is not None
            computing = engine._parts.core
            computing.overlaps = True
            may_go_on = held_after(engine, 3)
            original = computing.passes.run

            def dies(parts: Any, follows: Any = None) -> Any:
                if any(event.finish is not None for event in computing._events):
                    raise RuntimeError("the device is lost")
                return original(parts, follows)

            computing.passes.run = dies  # type: ignore[method-assign]
            other = engine.generate(request("a", PROMPT, max_tokens=200))
            await anext(other)
            asyncio.get_running_loop().call_later(0.05, may_go_on.set)  # once b has come too
            async with asyncio.timeout(60):
                complete = await answer(engine, request("b", PROMPT, max_tokens=1))
            assert complete.finish_reason == "length"
            with pytest.raises(EngineDeadError):
                async for _ in other:
                    pass

    run(ask())


def test_a_dead_engine_says_so_to_everyone_and_can_be_started_again(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> None:
        engine = EmbeddedEngine(settings(base.folder))
        with pytest.raises(EngineDeadError):
            await answer(engine, request("early", PROMPT))
        await engine.start()
        assert engine._parts is not None

        def broken(*_: Any) -> Any:
            raise RuntimeError("the device is gone")

        may_go_on = held_after(engine, 3)
        running = [
            asyncio.ensure_future(answer(engine, request(f"{at}", PROMPT, max_tokens=200)))
            for at in range(3)
        ]
        await until(lambda: engine.state().running)
        assert engine._parts.core.tiers is not None
        monkeypatch.setattr(
            engine._parts.core.tiers, "close", broken
        )  # nor is its memory given back
        engine._parts.core.passes.run = broken  # type: ignore[method-assign, assignment]
        may_go_on.set()
        for found in await asyncio.gather(*running, return_exceptions=True):
            assert isinstance(found, EngineDeadError) and "device is gone" in str(found)
        with pytest.raises(EngineDeadError):
            await answer(engine, request("late", PROMPT))
        assert not engine.state().healthy
        await engine.stop()
        await engine.stop()
        await engine.start()
        assert len((await answer(engine, request("again", PROMPT))).token_ids) == 8
        await engine.stop()
        assert not engine.state().healthy

    run(ask())


def test_stopping_cancels_what_runs(base: Any) -> None:
    async def ask() -> None:
        engine = EmbeddedEngine(settings(base.folder))
        await engine.start()
        may_go_on = held_after(engine, 3)
        running = asyncio.ensure_future(answer(engine, request("a", PROMPT, max_tokens=240)))
        await until(lambda: engine.state().running)
        asyncio.get_running_loop().call_soon(may_go_on.set)  # once it has been told to stop
        await engine.stop()
        assert (await running).finish_reason == "cancelled"

    run(ask())
