"""Adapters in tiers: loaded when asked for, evicted, pinned, forgotten, refused; nobody starves."""

import asyncio
import json
import shutil
import threading
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serve.embedded import (
    Peft,
    answer,
    answers,
    base_folder,
    held_after,
    idle,
    request,
    save_adapter,
    settings,
    started,
    until,
)
from tunefork.errors import AdapterError, EngineDeadError, EngineError, NoAdapterMemoryError
from tunefork.serve.engine import Piece, ServedAdapter
from tunefork.serve.engines import trial
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.tiers import Tiers

PROMPT = [20, 60, 100, 140, 180, 220]


class Served:
    """A base and six adapters."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        self.model = base_folder(self.base)
        self.adapters = [
            save_adapter(self.model, folder / f"a{at}", rank=4 * (1 + at % 3), seed=at)
            for at in range(6)
        ]
        self._peft = Peft(self.model)

    def expected(self, adapter: ServedAdapter | None, new: int = 8) -> list[int]:
        """PEFT's."""
        return self._peft.says(adapter, PROMPT, new)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("adapters"))


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def tiers_of(engine: EmbeddedEngine) -> Tiers:
    assert engine._parts is not None and engine._parts.core.tiers is not None
    return engine._parts.core.tiers


def test_more_adapters_than_slots_take_turns(served: Served) -> None:
    """Six adapters, two slots, three requests each, all at once: every answer is PEFT's."""

    async def ask() -> None:
        async with started(served.base, slots=2) as engine:
            wanted = [
                request(f"{at}", PROMPT, served.adapters[at % 6], max_tokens=8) for at in range(18)
            ]
            found = await answers(engine, wanted)
            for one, piece in zip(wanted, found, strict=True):
                assert list(piece.token_ids) == served.expected(one.adapter)
            state = await idle(engine)
            assert (state.slots, len(state.resident)) == (2, 2)
            assert state.loads >= 6 and state.evictions == state.loads - 2
            assert set(state.load_seconds) == {"read", "copy", "trial"}
            assert all(seconds > 0 for seconds in state.load_seconds.values())

    run(ask())


def test_an_adapter_in_demand_does_not_keep_others_out(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slot, an adapter that is asked for without a pause, and another that waits."""
    monkeypatch.setattr("tunefork.serve.engines.tiers.PATIENCE_S", 0.05)

    async def ask() -> None:
        async with started(served.base, slots=1) as engine:
            is_over = False

            async def hammer(who: int) -> None:
                at = 0
                while not is_over:
                    at += 1
                    wanted = request(f"h{who}-{at}", PROMPT, served.adapters[0], max_tokens=30)
                    await answer(engine, wanted)

            hammers = [asyncio.ensure_future(hammer(who)) for who in range(4)]
            await asyncio.sleep(0.2)
            found = await asyncio.wait_for(
                answer(engine, request("w", PROMPT, served.adapters[1])), timeout=60
            )
            assert list(found.token_ids) == served.expected(served.adapters[1])
            is_over = True
            await asyncio.gather(*hammers)

    run(ask())


def test_pinned_adapters_stay_and_prefetched_ones_are_there(served: Served) -> None:
    async def ask() -> None:
        async with started(served.base, slots=2) as engine:
            await engine.pin(served.adapters[0], True)
            await engine.prefetch(served.adapters[1])
            await until(lambda: len(engine.state().resident) == 2)
            assert set(engine.state().resident) == {"a0:v1", "a1:v1"}
            await engine.prefetch(served.adapters[5])  # no slot is free: host memory
            for at in (1, 2, 3, 4):
                await answer(engine, request(f"{at}", PROMPT, served.adapters[at]))
                assert "a0:v1" in engine.state().resident
            assert "a5:v1" in engine.state().in_host_memory
            await engine.pin(served.adapters[0], False)
            await answers(engine, [request(f"n{at}", PROMPT, served.adapters[at]) for at in (1, 2)])
            assert "a0:v1" not in engine.state().resident

    run(ask())


def test_a_forgotten_adapter_goes_once_its_requests_are_over(served: Served) -> None:
    async def ask() -> None:
        async with started(served.base) as engine:
            may_go_on = held_after(engine, 3)
            wanted = request("a", PROMPT, served.adapters[0], max_tokens=60)
            running = asyncio.ensure_future(answer(engine, wanted))
            await until(lambda: engine.state().running)
            await engine.forget("a0:v1")
            again = asyncio.ensure_future(answer(engine, request("b", PROMPT, served.adapters[0])))
            await until(lambda: engine._num_open == 2)
            may_go_on.set()
            assert list((await again).token_ids) == served.expected(served.adapters[0])
            assert list((await running).token_ids) == served.expected(served.adapters[0], 60)
            assert engine.state().loads == 1  # one id is one content: nothing is read again
            await engine.forget("unknown:v9")
            await until(lambda: not engine.state().resident and not engine.state().in_host_memory)
            assert len(tiers_of(engine).free) == 4

    run(ask())


def test_host_memory_is_limited(served: Served) -> None:
    async def ask() -> None:
        async with started(served.base, slots=1, host_memory_bytes=1) as engine:
            for turn in range(2):
                for at in (0, 1):
                    wanted = request(f"{turn}-{at}", PROMPT, served.adapters[at])
                    found = await answer(engine, wanted)
                    assert list(found.token_ids) == served.expected(served.adapters[at])
            state = await idle(engine)
            assert state.in_host_memory == () and state.loads == 4

    run(ask())


def test_two_versions_of_one_tag_are_two_adapters(served: Served, tmp_path: Path) -> None:
    """Old requests finish with what they began with."""
    first = served.adapters[0]
    second = replace(save_adapter(served.model, tmp_path / "new", rank=8, seed=77), id="a0:v2")

    async def ask() -> None:
        async with started(served.base) as engine:
            may_go_on = held_after(engine, 3)
            old = asyncio.ensure_future(answer(engine, request("o", PROMPT, first, max_tokens=60)))
            await until(lambda: engine.state().running)
            await engine.forget(first.id)
            may_go_on.set()
            new = await answer(engine, request("n", PROMPT, second))
            assert list(new.token_ids) == served.expected(second)
            assert list((await old).token_ids) == served.expected(first, 60)

    run(ask())


def _damaged(source: ServedAdapter, folder: Path, how: str) -> ServedAdapter:
    shutil.copytree(source.folder, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "lora_B" in key)
    match how:
        case "dead":
            tensors = {k: t * 0 if "lora_B" in k else t for k, t in tensors.items()}
        case "no effect":
            tensors = {k: t * 1e-38 if "lora_B" in k else t for k, t in tensors.items()}
        case "missing":
            del tensors[name]
        case "nan":
            tensors[name][0, 0] = torch.nan
        case "overflow":
            tensors = {k: t * 1e25 for k, t in tensors.items()}
        case "gone":
            shutil.rmtree(folder)
            return replace(source, id=f"{how}:v1", folder=folder)
        case "dora":
            config = json.loads((folder / "adapter_config.json").read_text())
            config["use_dora"] = True
            (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, file)
    return replace(source, id=f"{how}:v1", folder=folder)


@pytest.mark.parametrize("how", ["dead", "no effect", "missing", "nan", "overflow", "gone", "dora"])
def test_an_adapter_that_cannot_be_served_fails_its_own_requests(
    served: Served, tmp_path: Path, how: str
) -> None:
    sick = _damaged(served.adapters[1], tmp_path / "sick", how)

    async def ask() -> None:
        async with started(served.base) as engine:
            wanted = [request("s1", PROMPT, sick), request("s2", PROMPT, sick)]
            well = request("w", PROMPT, served.adapters[0])
            found = await asyncio.gather(
                *(answer(engine, one) for one in (*wanted, well)), return_exceptions=True
            )
            assert all(isinstance(one, AdapterError) for one in found[:2]), found
            assert isinstance(found[2], Piece)
            assert list(found[2].token_ids) == served.expected(served.adapters[0])
            await idle(engine)
            assert engine.state().resident == ("a0:v1",)
            assert len(tiers_of(engine).free) == 3

    run(ask())


def test_a_rank_above_the_slots_is_refused_with_what_to_do(served: Served) -> None:
    async def ask() -> None:
        async with started(served.base, max_rank=4) as engine:
            with pytest.raises(AdapterError, match="embedded.max_rank=8"):
                await answer(engine, request("a", PROMPT, served.adapters[1]))

    run(ask())


def test_others_go_on_while_an_adapter_is_read(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading takes until the others are answered; who does not need it does not wait for it."""

    async def ask() -> None:
        async with started(served.base) as engine:
            tiers = tiers_of(engine)
            read, others = tiers.loading.read, threading.Event()

            def slowly(adapter: ServedAdapter) -> Any:
                assert others.wait(20)
                return read(adapter)

            tiers.loading.read = slowly
            late = asyncio.ensure_future(answer(engine, request("l", PROMPT, served.adapters[0])))
            for at in range(3):
                await answer(engine, request(f"{at}", PROMPT))
            assert not late.done()
            others.set()
            assert list((await late).token_ids) == served.expected(served.adapters[0])

    run(ask())


@pytest.mark.parametrize("step", ["read", "copied", "tried"])
def test_without_memory_who_waits_is_told_and_who_comes_later_is_answered(
    served: Served, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Also those who wait while no more requests may run; others go on."""
    calls: list[str] = []
    both_wait = threading.Event()

    def first_fails(do: Callable[..., Any]) -> Callable[..., Any]:
        def called(*told: Any) -> Any:
            calls.append(step)
            if len(calls) == 1:
                torch.empty(1 << 50)
            return do(*told)

        return called

    async def ask() -> None:
        async with started(served.base, max_requests=1, prefill_tokens=1) as engine:
            tiers, adapter, read = (
                tiers_of(engine),
                served.adapters[0],
                tiers_of(engine).loading.read,
            )
            match step:
                case "read":
                    read = first_fails(read)
                case "copied":
                    tiers.slots.load = first_fails(tiers.slots.load)  # type: ignore[method-assign]
                case "tried":
                    monkeypatch.setattr(trial, "verdict_of", first_fails(trial.verdict_of))

            def once_both_wait(one: ServedAdapter) -> Any:
                assert both_wait.wait(60)
                return read(one)

            tiers.loading.read = once_both_wait
            found = [
                asyncio.ensure_future(answer(engine, request(name, PROMPT, adapter)))
                for name in "ab"
            ]
            await until(lambda: engine.state().waiting == 2)
            well = asyncio.ensure_future(answer(engine, request("w", PROMPT, max_tokens=30)))
            await until(lambda: engine.state().running or well.done())
            both_wait.set()
            for one in await asyncio.gather(*found, return_exceptions=True):
                assert isinstance(one, NoAdapterMemoryError)
                assert f"while {'an adapter' if step == 'tried' else 'it'} was {step}" in str(one)
            assert isinstance(await well, Piece)
            assert len(tiers.free) == (3 if step == "tried" else 4)  # there it may still be evicted
            later = await answer(engine, request("l", PROMPT, adapter))
            assert list(later.token_ids) == served.expected(adapter) and len(calls) == 2

    run(ask())


@pytest.mark.parametrize("error", [RuntimeError("bus error"), KeyError("lost")])
def test_a_load_that_breaks_is_an_error_of_its_requests(served: Served, error: Exception) -> None:
    async def ask() -> None:
        async with started(served.base) as engine:

            def broken(*_: Any) -> None:
                raise error

            tiers_of(engine).slots.load = broken  # type: ignore[method-assign, assignment]
            with pytest.raises(EngineError, match="cannot be loaded"):
                await answer(engine, request("a", PROMPT, served.adapters[0]))
            assert len((await answer(engine, request("b", PROMPT))).token_ids) == 8
            assert len(tiers_of(engine).free) == 4

    run(ask())


@pytest.mark.parametrize("dies", [False, True])
def test_a_stopped_engine_holds_nothing(served: Served, dies: bool) -> None:
    """Whether it died before, and while a client still has not read its answer."""

    async def ask() -> None:
        engine = EmbeddedEngine(settings(served.base))
        await engine.start()
        unread = engine.generate(request("u", PROMPT, served.adapters[0], max_tokens=200))
        await anext(unread)
        assert engine._parts is not None
        core, model = engine._parts.core, engine._parts.model
        assert core.tiers is not None
        held = [core, core.tiers, core.tiers.slots, core.passes, model, *model.modules()]
        left = [weakref.ref(one) for one in held]
        if dies:
            core.passes.run = None  # type: ignore[method-assign, assignment]
            with pytest.raises(EngineDeadError):
                await answer(engine, request("d", PROMPT))
        del core, model, held
        await engine.stop()
        assert [type(one()).__name__ for one in left if one() is not None] == []
        assert not [t.name for t in threading.enumerate() if t.name.startswith("tunefork")]
        await unread.aclose()

    run(ask())


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_merged_replica_answers_as_its_adapter(served: Served, kind: str) -> None:
    adapter = served.adapters[3]

    async def ask() -> None:
        engine = EmbeddedEngine(settings(served.base, base_storage=kind), merged=adapter)
        await engine.start()
        found = await answer(engine, request("a", PROMPT, max_tokens=8))
        if kind == "dense":
            assert list(found.token_ids) == served.expected(adapter)
            with pytest.raises(EngineError, match="no slots"):
                await answer(engine, request("b", PROMPT, adapter))
        assert engine.state().slots == 0
        await engine.stop()

    run(ask())


def test_adapters_over_a_base_in_four_bits(served: Served) -> None:
    """The same as PEFT's adapter over that base, as far as its own NF4 layers go."""

    async def ask() -> None:
        async with started(served.base, base_storage="nf4") as engine:
            wanted = [request(f"{at}", PROMPT, served.adapters[at]) for at in range(3)]
            base, *found = await answers(engine, [request("b", PROMPT), *wanted])
            assert len({piece.token_ids for piece in (base, *found)}) == 4

    run(ask())
