"""Passes launched ahead: hundreds of simulated engines, each as without; and a real one.

Whatever may end a request is drawn: stop tokens, stop texts, lengths, logits that are not finite,
cancellations, deadlines, engines that stop or die. Some sample; others follow a grammar, join, wait
for adapters, or are put off by a full cache.
"""

import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.serve import lazy_device
from tests.serve.embedded import request
from tests.serve.lazy_device import VOCABULARY
from tests.serve.simulated_engine import ADAPTERS, Simulation, Told, content_of
from tunefork.errors import EngineDeadError
from tunefork.serve.engine import EngineRequest, ServedAdapter
from tunefork.serve.engines import core, sequence, tiers, trial

_INNOCENT = ("stop", "length", "EngineError")
"""Ends that are of a request itself."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    clock = SimpleNamespace(monotonic=None)
    monkeypatch.setattr(core, "time", clock)
    monkeypatch.setattr(sequence, "HEADROOM", 24)
    monkeypatch.setattr(tiers, "Loading", lazy_device.Loading)
    monkeypatch.setattr(trial, "verdict_of", lazy_device.Verdict)
    yield clock


class _Matcher:
    """Even tokens, `left` of them."""

    def __init__(self, left: int) -> None:
        self.left = left

    def allowed(self) -> torch.Tensor:
        return torch.arange(VOCABULARY) % 2 == 0

    def take(self, token: int) -> bool:
        self.left -= 1
        return self.left == 0


class _World:
    """What is asked of an engine, and when; the same for any engine."""

    def __init__(
        self,
        seed: int,
        *,
        tokens_suffice: float = 0.9,
        adapters: Sequence[ServedAdapter] = ADAPTERS,
    ) -> None:
        dice = random.Random(seed)
        self.dice, self.simulated = dice, dict[str, EngineRequest]()
        self.arrivals, self.cancels, self.forgets = list[Any](), list[Any](), list[Any]()
        self.greedy, self.sampled = set[str](), set[str]()
        when = 0.0
        for at in range(dice.randint(4, 18)):
            when += dice.choice((0, 0, 0, 3, 30))
            name, sampling = f"r{at}", dict[str, Any]()
            max_tokens = dice.choice((1, 2, 5, 20, 60, 120))
            if dice.random() < 0.5:
                sampling["stop_ids"] = tuple(dice.sample(range(VOCABULARY), 2))
            if dice.random() < 0.3:
                sampling["stop"] = (dice.choice("abcd") + dice.choice("efgh"), dice.choice("xyz"))
            matcher = None
            is_hot = at % 3 == 0
            if is_hot:
                sampling |= {"temperature": 1.0, "seed": at}
            if dice.random() < tokens_suffice:
                (self.sampled if is_hot else self.greedy).add(name)
            else:
                kind = dice.choice(("biased", "penalised", "grammar", "logprobs"))
                kinds: dict[str, dict[str, Any]] = {
                    "biased": {"logit_bias": {at: 1.0}},
                    "penalised": {"presence_penalty": 1.0},
                    "grammar": {},
                    "logprobs": {"logprobs": 2},
                }
                sampling |= kinds[kind]
                matcher = dice.randint(1, 9) if kind == "grammar" else None
            adapter = None if dice.random() < 0.4 else dice.choice(adapters)
            deadline = when + dice.randint(1, 60) if dice.random() < 0.1 else None
            prompt = [dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 50))]
            wanted = request(
                name, prompt, adapter, deadline=deadline, max_tokens=max_tokens, **sampling
            )
            self.arrivals.append((when, wanted, matcher))
            self.simulated[name] = wanted
            if dice.random() < 0.15:
                self.cancels.append((when + dice.randint(0, 40), name))
            if dice.random() < 0.1 and adapter is not None:
                self.forgets.append((when + dice.randint(0, 40), adapter.id))

    def live(self, simulation: Simulation) -> None:
        core = simulation.core
        assert core.tiers is not None
        forget = core.tiers.forget

        def cancel(name: str) -> None:
            is_open = name in [answer.request.id for answer in core.scheduler.open()]
            core.cancel(name)
            if is_open:
                simulation.told[name].end = "cancelled"  # nothing may come any more

        simulation.events = [
            *(
                (when, lambda w=wanted, m=left: simulation.add(w, m and _Matcher(m)))
                for when, wanted, left in self.arrivals
            ),
            *((when, lambda n=name: cancel(n)) for when, name in self.cancels),
            *((when, lambda i=adapter: forget(i)) for when, adapter in self.forgets),
        ]
        simulation.run()

    def follows(self, told: dict[str, Told]) -> None:
        """Greedy tokens are the likeliest after those before them, by the request's adapter, and
        sampled ones are drawn by the numbers of its seed, one a token."""
        for name in (self.greedy | self.sampled) & told.keys():
            wanted = self.simulated[name]
            numbers = random.Random(wanted.sampling.seed)
            content = content_of(wanted.adapter)
            at = lazy_device.hash_of(wanted.prompt_ids, content)
            for token in told[name].tokens:
                expected = lazy_device.likeliest(at)
                if name in self.sampled:
                    expected = lazy_device.drawn(at, numbers.random())
                assert token == expected, name
                at = lazy_device.after(at, token, content)


def _lived(seed: int, clock: Any, *, ahead: bool) -> tuple[_World, Simulation]:
    world = _World(seed)
    simulation = Simulation(seed, ahead=ahead, clock=clock)
    world.live(simulation)
    simulation.close()
    world.follows(simulation.told)
    return world, simulation


def _innocent(world: _World, told: dict[str, Told]) -> dict[str, Told]:
    hurried = {name for _, name in world.cancels}
    hurried |= {name for name, one in world.simulated.items() if one.deadline is not None}
    return {name: one for name, one in told.items() if name not in hurried}


@pytest.mark.parametrize(
    "first",
    [*range(0, 100, 50), *(pytest.param(n, marks=pytest.mark.slow) for n in range(100, 300, 50))],
)
def test_every_answer_is_as_without(first: int, clock: Any) -> None:
    """300 engines, and as many without passes ahead."""
    num_ahead = num_passes = 0
    for seed in range(first, first + 50):
        world, plain = _lived(seed, clock, ahead=False)
        _, ahead = _lived(seed, clock, ahead=True)
        assert plain.passes.num_ahead == 0
        num_ahead += ahead.passes.num_ahead
        num_passes += len(ahead.passes.log)
        found = _innocent(world, ahead.told)
        assert found == _innocent(world, plain.told), seed
        assert {one.end for one in found.values()} <= set(_INNOCENT)
    assert num_ahead > 0.3 * num_passes


def _breaks(simulation: Simulation, error: Exception, chance: float, *, for_good: bool) -> None:
    """Launches and waits fail by that chance, or from then on."""
    dice, is_broken = random.Random(simulation.gpu.dice.random()), False

    def fault() -> None:
        nonlocal is_broken
        is_broken = (is_broken and for_good) or dice.random() < chance
        if is_broken:
            raise error

    simulation.gpu.fault = fault


def test_want_of_memory_costs_one_request_and_changes_no_other(clock: Any) -> None:
    """At any launch, ahead or not, and where tokens are waited for."""
    for seed in range(100):
        world, plain = _lived(seed, clock, ahead=False)
        short = Simulation(seed, ahead=True, clock=clock)
        _breaks(short, torch.OutOfMemoryError("none left"), 0.02, for_good=False)
        world.live(short)
        short.close()
        world.follows(short.told)
        for name, told in _innocent(world, short.told).items():
            if told.end not in ("NoMemoryError", "NoAdapterMemoryError"):
                assert told == plain.told[name], name


def test_a_dead_engine_tells_everyone_once(clock: Any) -> None:
    for seed in range(100):
        world, simulation = _World(seed), Simulation(seed, ahead=True, clock=clock)
        _breaks(simulation, RuntimeError("the device is lost"), 0.01, for_good=True)
        error = None
        try:
            world.live(simulation)
        except RuntimeError as found:
            error = EngineDeadError(str(found))
        simulation.close(error)
        world.follows(simulation.told)


def _stops(simulation: Simulation, launches: int) -> None:
    """It is told to, when that number of launches or waits has begun."""
    left = launches

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            simulation.core.tell(simulation.core.end)

    simulation.gpu.fault = count


def test_a_stopped_engine_tells_what_was_computed(clock: Any) -> None:
    """A pass that is under way is waited for: its graph is not taken from under it."""
    for seed in range(100):
        world, simulation = _World(seed), Simulation(seed, ahead=True, clock=clock)
        _stops(simulation, launches=1 + seed)
        world.live(simulation)
        simulation.close()
        log = simulation.passes.log
        chose = [chosen.number for chosen, parts in log if any(part.wants_logits for part in parts)]
        assert simulation.gpu.done >= max(chose, default=0)
        world.follows(simulation.told)


def test_a_gpu_has_the_next_pass_when_the_host_waits_for_the_last(clock: Any) -> None:
    """But for those that end; a prompt that comes is in the next pass that is launched."""
    simulation = Simulation(0, ahead=True, clock=clock)
    for at in range(4):
        simulation.add(request(f"{at}", [at, 5], max_tokens=40))
    came: list[int] = []

    def come() -> None:
        came.append(len(simulation.passes.log))
        simulation.add(request("late", [7] * 10, max_tokens=5))

    simulation.events = [(20.0, come)]
    simulation.run()
    simulation.close()
    log = simulation.passes.log
    assert [chosen.behind for chosen, _ in log] == [1] * (len(log) - 1) + [0]
    assert sum(len(parts) for _, parts in log) == 4 * 40 + 5  # no row in vain
    prompt = next(at for at, (_, parts) in enumerate(log) if len(parts[-1].ids) == 10)
    assert prompt == came[0]


def test_who_waits_has_the_place_of_one_that_is_known_to_end(clock: Any) -> None:
    """As soon as without passes ahead: there are as many passes, and as full."""
    rows = []
    for ahead in (False, True):
        simulation = Simulation(0, ahead=ahead, clock=clock, max_requests=3)
        for at in range(9):
            simulation.add(request(f"{at}", [at, 5], max_tokens=5 + 3 * at))
        simulation.run()
        simulation.close()
        rows.append([len(parts) for _, parts in simulation.passes.log])
    assert rows[0] == rows[1]
