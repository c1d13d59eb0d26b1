"""Passes ahead on a GPU: the same tokens as without, whatever ends while one is under way."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.embedded import answer, answers, base_folder, idle, request, save_adapter, settings
from tests.serve.embedded import until as comes_to
from tunefork.serve.engine import EngineRequest, Piece, ServedAdapter
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.launched import Arriving, Follows
from tunefork.serve.engines.layout import Layout
from tunefork.serve.engines.passes import Passes

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning:peft")]
PROMPT = [20, 60, 100, 140, 180, 220]
LONG = 60


def test_tokens_arrive_while_what_was_launched_behind_them_computes() -> None:
    """And are those that were there then."""
    tokens_r = torch.arange(5, device="cuda")
    Arriving(tokens_r).wait()  # pinned memory is there
    torch.cuda._sleep(10**7)
    arriving = Arriving(tokens_r)
    tokens_r += 1
    torch.cuda._sleep(2 * 10**9)
    assert arriving.wait() == [0, 1, 2, 3, 4]
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert Arriving(tokens_r[:0]).wait() == []


def test_ids_are_taken_where_they_were_chosen() -> None:
    """One that is none (its logits were not finite) is looked up as 0."""
    layout = Layout(8, 4, torch.device("cuda"))
    layout.numbers["ids"][:4] = (7, 7, 7, 9)
    tokens_r = torch.tensor([10, -1, 12, 13], device="cuda")
    layout.send(Follows(tokens_r, [3, 1, 0]))
    assert layout.tensors["ids"].tolist() == [13, 0, 10, 9, 0, 0, 0, 0]
    layout.send()
    assert layout.tensors["ids"].tolist() == [7, 7, 7, 9, 0, 0, 0, 0]


class Served:
    """A base and four adapters on the disk."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        model = base_folder(self.base)
        self.adapters: list[ServedAdapter | None] = [
            None,
            *(save_adapter(model, folder / f"a{at}", rank=8, seed=at + 1) for at in range(4)),
        ]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def num_ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each pass ahead had."""
    found: list[int] = []
    compute = Passes.run

    def run(passes: Passes, parts: Any, follows: Any = None) -> Any:
        found.extend([] if follows is None else [len(parts)])
        return compute(passes, parts, follows)

    monkeypatch.setattr(Passes, "run", run)
    return found


def on_a_gpu(
    served: Served, do: Callable[[EmbeddedEngine], Coroutine[Any, Any, Any]], **embedded: Any
) -> Any:
    """What `do` gives of an engine whose adapters are in their slots."""

    async def run() -> Any:
        options = {"device": "cuda", "dtype": "bf16"} | embedded
        engine = EmbeddedEngine(settings(served.base, **options))
        await engine.start()
        assert engine.info()["cuda_graphs"]
        await answers(engine, [request(f"w{a}", PROMPT, a, max_tokens=1) for a in served.adapters])
        found = await do(engine)
        assert (await idle(engine)).healthy  # and every token of the cache is free again
        await engine.stop()
        return found

    return asyncio.run(run())


@contextmanager
def all_at_once(engine: EmbeddedEngine) -> Iterator[None]:
    """Who asks meanwhile begins in the same pass: so batches are the same in every run."""
    assert engine._parts is not None
    may_go_on = threading.Event()

    def hold() -> None:
        assert may_go_on.wait(60)

    engine._parts.core.tell(hold)
    try:
        yield
    finally:
        may_go_on.set()


async def asked_at_once(engine: EmbeddedEngine, wanted: list[EngineRequest]) -> list[Piece]:
    before = engine._num_open
    with all_at_once(engine):
        tasks = [asyncio.ensure_future(answer(engine, one)) for one in wanted]
        await comes_to(lambda: engine._num_open == before + len(wanted))
        await asyncio.sleep(0.05)
    return [await task for task in tasks]


@pytest.mark.parametrize("options", [{}, {"compile": False}, {"base_storage": "fp8"}])
def test_tokens_are_those_of_passes_that_wait(
    served: Served, num_ahead: list[int], options: dict[str, Any]
) -> None:
    """Of different lengths, some with a stop token; never fewer than nine rows, which are filled
    up to sixteen, so that one that was computed in vain is in the same graph."""
    whose = served.adapters

    async def whole(engine: EmbeddedEngine) -> list[Piece]:
        wanted = [
            request(f"{at}", PROMPT[at % 3 :], whose[at % 5], max_tokens=LONG + at % 4)
            for at in range(16)
        ]
        return await asked_at_once(engine, wanted)

    plain = on_a_gpu(served, whole, ahead=False, **options)
    assert not num_ahead
    found = on_a_gpu(served, whole, **options)
    assert [piece.token_ids for piece in found] == [piece.token_ids for piece in plain]
    assert len(num_ahead) > LONG - 10
    first = {at: piece.token_ids for at, piece in enumerate(plain) if at < 6}

    async def stopped(engine: EmbeddedEngine) -> list[Piece]:
        wanted = [
            request(
                f"{at}",
                PROMPT[at % 3 :],
                whose[at % 5],
                max_tokens=LONG + at % 4,
                stop_ids=(first[at][10 + 5 * at],) if at in first else (),
            )
            for at in range(16)
        ]
        return await asked_at_once(engine, wanted)

    plain = on_a_gpu(served, stopped, ahead=False, **options)
    found = on_a_gpu(served, stopped, **options)
    assert [(piece.token_ids, piece.text, piece.finish_reason) for piece in found] == [
        (piece.token_ids, piece.text, piece.finish_reason) for piece in plain
    ]
    assert sum(piece.finish_reason == "stop" for piece in found) == 6


@pytest.mark.parametrize("options", [{}, {"base_storage": "fp8"}])
def test_drawn_tokens_are_those_of_passes_that_wait(
    served: Served, num_ahead: list[int], options: dict[str, Any]
) -> None:
    """By every kind of limit, greedy ones among them; six end by a stop token, each with a row
    computed in vain, and no number of any answer is shifted by it."""
    ways: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.0},
        {"temperature": 1.5, "top_k": 20},
        {"temperature": 1.0, "top_k": 40, "top_p": 0.8},
    ]

    def asked(stops: dict[int, int]) -> list[EngineRequest]:
        return [
            request(
                f"{at}",
                PROMPT[at % 3 :],
                served.adapters[at % 4],
                max_tokens=LONG + at % 4,
                stop_ids=(stops[at],) if at in stops else (),
                seed=at,
                **ways[at % 5],
            )
            for at in range(16)
        ]

    def found(stops: dict[int, int], *, ahead: bool) -> list[tuple[int, ...]]:
        async def ask(engine: EmbeddedEngine) -> list[Piece]:
            return await asked_at_once(engine, asked(stops))

        pieces = on_a_gpu(served, ask, ahead=ahead, **options)
        return [piece.token_ids for piece in pieces]

    plain = found({}, ahead=False)
    assert not num_ahead and len(set(plain)) == 16
    assert found({}, ahead=True) == plain
    assert len(num_ahead) > LONG - 10
    stops = {at: plain[at][10 + 5 * at] for at in range(6)}
    assert found(stops, ahead=True) == found(stops, ahead=False)


def test_clients_that_vanish_in_mid_flight_change_no_other_answer(
    served: Served, num_ahead: list[int]
) -> None:
    async def ask(engine: EmbeddedEngine, vanish: int) -> list[Piece]:
        streams = [
            engine.generate(request(f"v{at}", PROMPT, served.adapters[at % 5], max_tokens=200))
            for at in range(vanish)
        ]
        for stream in streams:
            await anext(stream)
        wanted = [
            request(f"{at}", PROMPT, served.adapters[at % 5], max_tokens=LONG) for at in range(10)
        ]
        tasks = [asyncio.ensure_future(answer(engine, one)) for one in wanted]
        for stream in streams:
            await anext(stream)
            await stream.aclose()
        return [await task for task in tasks]

    quiet = on_a_gpu(served, lambda engine: ask(engine, 0))
    found = on_a_gpu(served, lambda engine: ask(engine, 6))
    assert num_ahead
    # Batches differ in size, and so does rounding: tokens may part, but not at once.
    same = sum(a.token_ids[:4] == b.token_ids[:4] for a, b in zip(quiet, found, strict=True))
    assert same >= 7


def test_slots_that_are_given_up_in_mid_flight(served: Served, num_ahead: list[int]) -> None:
    """Four adapters take turns in two slots, and end by stop tokens beside one that goes on."""
    often = tuple(range(0, 300, 3))

    async def ask(engine: EmbeddedEngine, together: bool) -> list[Piece]:
        wanted = [
            request(
                f"{at}",
                PROMPT[at % 3 :],
                served.adapters[1 + at % 4],
                stop_ids=often,
                max_tokens=40,
            )
            for at in range(16)
        ]
        going_on = engine.generate(request("on", PROMPT, max_tokens=240))
        await anext(going_on)
        if together:
            found = list(await asyncio.gather(*(answer(engine, one) for one in wanted)))
        else:
            found = [await answer(engine, one) for one in wanted]
        await going_on.aclose()
        return found

    alone = on_a_gpu(served, lambda engine: ask(engine, together=False), slots=4)
    found = on_a_gpu(served, lambda engine: ask(engine, together=True), slots=2)
    same = sum(a.token_ids[:2] == b.token_ids[:2] for a, b in zip(alone, found, strict=True))
    assert same >= 12 and num_ahead


def test_an_engine_that_stops_in_mid_flight_can_be_started_again(
    served: Served, num_ahead: list[int]
) -> None:
    async def run() -> None:
        engine = EmbeddedEngine(settings(served.base, device="cuda", dtype="bf16"))
        for _ in range(3):
            await engine.start()
            wanted = request("a", PROMPT, served.adapters[1], max_tokens=240)
            stream = engine.generate(wanted)
            told = [await anext(stream)]
            await comes_to(lambda: num_ahead)
            await engine.stop()
            told += [piece async for piece in stream]
            assert told[-1].finish_reason in ("cancelled", "length")
            assert sum(len(piece.token_ids) for piece in told) == wanted.meter.tokens
            num_ahead.clear()

    asyncio.run(run())
