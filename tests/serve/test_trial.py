"""Trials of adapters that nobody waits for: in simulated engines, and in a real one on a CPU."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serve.embedded import (
    Peft,
    answer,
    base_folder,
    held_after,
    idle,
    request,
    save_adapter,
    settings,
    started,
    until,
)
from tests.serve.simulated_engine import ADAPTERS, DEAD, ILL, Simulation
from tests.serve.test_ahead import _breaks, _innocent, _stops, _World
from tests.serve.test_ahead import clock as clock  # a fixture
from tests.serve.test_embedded import _as_a_gpu
from tests.serve.test_embedded_ahead import num_ahead as num_ahead  # a fixture
from tunefork.errors import AdapterError, EngineDeadError
from tunefork.serve.engine import Piece, ServedAdapter
from tunefork.serve.engines import trial
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.launched import Launched
from tunefork.serve.engines.trial import ROOM, TRIED

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
PROMPT = [20, 60, 100, 140, 180, 220]
_MIXED = [*ADAPTERS[:2], DEAD, ILL]


def _lived(seed: int, clock: Any, *, ahead: bool) -> tuple[_World, Simulation]:
    world = _World(seed, adapters=_MIXED)
    simulation = Simulation(seed, ahead=ahead, clock=clock)
    world.live(simulation)
    simulation.close()
    return world, simulation


def _says_nothing_of_bad_ones(world: _World, simulation: Simulation) -> set[str]:
    """What their requests ended with."""
    bad = [name for name, one in world.simulated.items() if one.adapter in (DEAD, ILL)]
    bad = [name for name in bad if name in simulation.told]
    assert not any(simulation.told[name].tokens for name in bad)
    world.follows({n: told for n, told in simulation.told.items() if n not in bad})
    return {str(simulation.told[name].end) for name in bad}


@pytest.mark.parametrize(
    "first",
    [*range(0, 100, 50), *(pytest.param(n, marks=pytest.mark.slow) for n in range(100, 200, 50))],
)
def test_no_token_of_a_bad_adapter_is_told_and_others_answer_as_ever(
    first: int, clock: Any
) -> None:
    """Beside requests that stream, join, are cancelled, put off; with and without passes ahead."""
    ends = set[str]()
    for seed in range(first, first + 50):
        world, plain = _lived(seed, clock, ahead=False)
        _, ahead = _lived(seed, clock, ahead=True)
        assert _innocent(world, plain.told) == _innocent(world, ahead.told), seed
        for simulation in (plain, ahead):
            found = _innocent(world, simulation.told)
            bad = [n for n in found if world.simulated[n].adapter in (DEAD, ILL)]
            assert {found[name].end for name in bad} <= {"AdapterError"}
            ends |= _says_nothing_of_bad_ones(world, simulation)
    assert {"AdapterError", "cancelled"} <= ends <= {"AdapterError", "cancelled", "deadline"}


def test_nothing_of_a_bad_adapter_is_told_where_memory_is_short(clock: Any) -> None:
    """The pass that tries it may not be launched, or be lost when it is waited for."""
    ends = set[str]()
    for seed in range(150):
        world = _World(seed, adapters=_MIXED)
        simulation = Simulation(seed, ahead=True, clock=clock)
        error = torch.OutOfMemoryError("none left")
        _breaks(simulation, error, 0.05, for_good=False)
        world.live(simulation)
        simulation.close()
        ends |= _says_nothing_of_bad_ones(world, simulation)
    assert ends >= {"AdapterError", "NoMemoryError", "NoAdapterMemoryError"}


def test_an_engine_stops_or_dies_while_adapters_are_tried(clock: Any) -> None:
    for seed in range(150):
        world = _World(seed, adapters=_MIXED)
        stops = Simulation(seed, ahead=True, clock=clock)
        _stops(stops, launches=1 + seed % 40)
        world.live(stops)
        stops.close()
        _says_nothing_of_bad_ones(world, stops)
        world, end = _World(seed, adapters=_MIXED), None
        dies = Simulation(seed, ahead=True, clock=clock)
        _breaks(dies, RuntimeError("the device is lost"), 0.03, for_good=True)
        try:
            world.live(dies)
        except RuntimeError as found:
            end = EngineDeadError(str(found))
        dies.close(end)
        _says_nothing_of_bad_ones(world, dies)


@pytest.mark.parametrize("adapter", [ADAPTERS[0], DEAD])
def test_a_gpu_is_never_kept_waiting_for_a_trial(adapter: ServedAdapter, clock: Any) -> None:
    """There is a pass behind each that is waited for, and there are as many as without."""
    passes = []
    for late in (None, adapter):
        simulation = Simulation(0, ahead=True, clock=clock)
        for at in range(4):
            simulation.add(request(f"{at}", [at, 5], max_tokens=40))
        wanted = request("late", [7] * 10, late, max_tokens=5)
        simulation.events = [(10.0, partial(simulation.add, wanted))]
        simulation.run()
        simulation.close()
        log = simulation.passes.log
        assert [chosen.behind for chosen, _ in log] == [1] * (len(log) - 1) + [0]
        trials = [parts[-TRIED:] for _, parts in log if len(parts[-1].ids) == ROOM // TRIED]
        assert len(trials) == (late is not None)
        passes.append(len(log))
    assert passes[0] == passes[1] == 40
    assert len(simulation.told["late"].tokens) == (0 if adapter is DEAD else 5)


# A real engine


class Served:
    """A base, an adapter, and two that cannot be served."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        self.model = base_folder(self.base)
        self.well, self.other, self.dead, self.ill = (
            save_adapter(self.model, folder / name, rank=4, seed=at)
            for at, name in enumerate(("well", "other", "dead", "ill"))
        )
        for one, by in ((self.dead, 1e-38), (self.ill, 1e25)):
            file = one.folder / "adapter_model.safetensors"
            save_file({k: t * by for k, t in load_file(file).items()}, file)
        self.expected = Peft(self.model).says


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("trials"))


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


@pytest.fixture(name="fixtures")
def _fixtures(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    return request.getfixturevalue


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each: how many rows of logits its pass had."""
    found: list[int] = []
    verdict_of = trial.verdict_of

    def noted(launched: Launched, *rows: int) -> Any:
        found.append(len(launched.logits_rv))
        return verdict_of(launched, *rows)

    monkeypatch.setattr(trial, "verdict_of", noted)
    return found


async def _is_as_at_the_start(engine: EmbeddedEngine, adapters: int = 0) -> None:
    """But for so many adapters in slots."""
    await idle(engine)
    assert engine._parts is not None
    tiers, scheduler = engine._parts.core.tiers, engine._parts.core.scheduler
    assert tiers is not None
    assert len(tiers.free) == 4 - adapters == 4 - len(engine.state().resident)
    assert not any(entry.users or entry.is_tried for entry in tiers.entries.values())
    assert scheduler.to_try() is None


@pytest.mark.parametrize(
    ("which", "rides"),
    [("dead", False), pytest.param("ill", False, marks=pytest.mark.slow), ("ill", True)],
)
def test_a_bad_adapter_beside_requests_that_stream(
    served: Served,
    trials: list[int],
    fixtures: Callable[[str], Any],
    which: str,
    rides: bool,
) -> None:
    """However many there are; by a CPU, and by the way of a GPU (where rows of fp32 that should be
    alike are not, so that what changes nothing cannot be told: `trial.py`)."""
    sick = getattr(served, which)
    ahead = fixtures("num_ahead") if rides else []

    async def ask() -> None:
        async with started(served.base, max_requests=16, fuse=not rides) as engine:
            if rides:
                _as_a_gpu(engine)
            for streams in (1, 3, 8, 14):
                others = [
                    request(f"{at}", PROMPT[at % 3 :], (None, served.well)[at % 2], max_tokens=40)
                    for at in range(streams)
                ]
                tasks = [asyncio.ensure_future(answer(engine, one)) for one in others]
                await until(partial(_has_running, engine, streams))
                bad = [request(f"s{at}", PROMPT * 3, sick) for at in range(2)]
                asked = (answer(engine, one) for one in bad)
                for error in await asyncio.gather(*asked, return_exceptions=True):
                    assert isinstance(error, AdapterError) and "it is not served" in str(error)
                for one, task in zip(others, tasks, strict=True):
                    expected = served.expected(one.adapter, list(one.prompt_ids), 40)
                    assert list((await task).token_ids) == expected
                await _is_as_at_the_start(engine, adapters=int(streams > 1))

    run(ask())
    alone = [rows == TRIED for rows in trials]
    assert not any(alone[1:]) if rides else all(alone)
    assert len(trials) == 5 and bool(ahead) == rides


def test_adapters_that_come_together_are_tried_one_a_pass(
    served: Served, trials: list[int]
) -> None:
    """And answer in the order in which they are; who asks for one under trial begins with it."""

    async def ask() -> None:
        async with started(served.base) as engine:
            whose = [served.well, served.dead, served.other, served.ill] * 2
            wanted = [request(f"{at}", PROMPT, one) for at, one in enumerate(whose)]
            asked = (answer(engine, one) for one in wanted)
            found = await asyncio.gather(*asked, return_exceptions=True)
            for one, told in zip(whose, found, strict=True):
                if one in (served.dead, served.ill):
                    assert isinstance(told, AdapterError)
                else:
                    assert isinstance(told, Piece)
                    assert list(told.token_ids) == served.expected(one, PROMPT, 8)
            await _is_as_at_the_start(engine, adapters=2)

    run(ask())
    assert len(trials) == 4


@pytest.mark.parametrize("which", ["well", "dead"])
def test_a_request_is_cancelled_while_its_adapter_is_tried(served: Served, which: str) -> None:
    """The pass is under way; the adapter may be forgotten meanwhile too."""
    adapter = getattr(served, which)

    async def ask(forgets: bool) -> None:
        async with started(served.base) as engine:
            may_go_on = held_after(engine, 0)
            task = asyncio.ensure_future(answer(engine, request("c", PROMPT, adapter)))
            await until(partial(_tries, engine))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if forgets:
                await engine.forget(adapter.id)
            may_go_on.set()
            is_there = which == "well" and not forgets
            await until(lambda: len(engine.state().resident) == int(is_there))
            await _is_as_at_the_start(engine, adapters=int(is_there))
            again = answer(engine, request("a", PROMPT, adapter))
            [found] = await asyncio.gather(again, return_exceptions=True)
            assert isinstance(found, Piece if which == "well" else AdapterError)

    for forgets in (False, True):
        run(ask(forgets))


def _tries(engine: EmbeddedEngine) -> bool:
    """An adapter is under trial, or about to be."""
    assert engine._parts is not None and engine._parts.core.tiers is not None
    return any(entry.is_tried for entry in engine._parts.core.tiers.entries.values())


def _has_running(engine: EmbeddedEngine, number: int) -> bool:
    return engine.state().running == number


def _has_open(engine: EmbeddedEngine, number: int) -> bool:
    return engine._num_open == number


def test_requests_that_arrive_during_a_trial_share_its_verdict(
    served: Served, trials: list[int]
) -> None:
    async def ask() -> None:
        for adapter in (served.well, served.dead):
            async with started(served.base) as engine:
                may_go_on = held_after(engine, 0)
                tasks = [asyncio.ensure_future(answer(engine, request("f", PROMPT, adapter)))]
                await until(partial(_tries, engine))
                tasks += [
                    asyncio.ensure_future(answer(engine, request(f"{at}", PROMPT, adapter)))
                    for at in range(3)
                ]
                await until(partial(_has_open, engine, 4))
                may_go_on.set()
                found = await asyncio.gather(*tasks, return_exceptions=True)
                if adapter is served.well:
                    assert all(isinstance(one, Piece) for one in found)
                    assert len(trials) == 1
                else:  # those that came later read it anew
                    assert all(isinstance(one, AdapterError) for one in found)
                    await _is_as_at_the_start(engine)

    run(ask())


def test_an_engine_stops_while_an_adapter_is_tried(served: Served) -> None:
    async def ask() -> None:
        engine = EmbeddedEngine(settings(served.base))
        for adapter in (served.well, served.dead):
            await engine.start()
            may_go_on = held_after(engine, 0)
            task = asyncio.ensure_future(answer(engine, request("s", PROMPT, adapter)))
            await until(partial(_tries, engine))
            assert engine._parts is not None
            core = engine._parts.core
            stopping = asyncio.ensure_future(engine.stop())
            await until(partial(len, core.inbox))
            may_go_on.set()
            await stopping
            [told] = await asyncio.gather(task, return_exceptions=True)
            if adapter is served.well:
                assert isinstance(told, Piece) and told.finish_reason == "cancelled"
            else:
                assert isinstance(told, AdapterError)
            assert core.cache.regions.free == core.cache.total
            assert core.tiers is not None and not core.tiers.entries

    run(ask())


def test_a_prompt_of_one_token_and_one_of_many_passes(served: Served, trials: list[int]) -> None:
    """The verdict is there before the first token of either."""

    async def ask() -> None:
        async with started(served.base, prefill_tokens=20) as engine:
            for at, prompt in enumerate(([20], PROMPT * 20)):
                for adapter in (served.dead, replace(served.well, id=f"well{at}:v1")):
                    asked = answer(engine, request("a", prompt, adapter))
                    [found] = await asyncio.gather(asked, return_exceptions=True)
                    if adapter is served.dead:
                        assert isinstance(found, AdapterError)
                    else:
                        assert isinstance(found, Piece)
                        expected = served.expected(adapter, prompt, 8)
                        assert list(found.token_ids) == expected

    run(ask())
    assert len(trials) == 4
