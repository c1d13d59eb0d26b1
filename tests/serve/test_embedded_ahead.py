"""A real model with passes ahead, on a CPU with stand-ins for the kernel and for graphs."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.embedded import (
    Peft,
    answer,
    answers,
    base_folder,
    request,
    save_adapter,
    settings,
)
from tests.serve.test_embedded import _Again, _as_a_gpu, _flash_by_numbers
from tunefork.errors import EngineError
from tunefork.serve.engine import EngineRequest, Piece, ServedAdapter
from tunefork.serve.engines import attention, base
from tunefork.serve.engines.choose import BAD
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.graphs import Graphs
from tunefork.serve.engines.passes import Passes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
PROMPT = [20, 60, 100, 140, 180, 220]
LONG = 40


class Served:
    """A base, three adapters and what PEFT says by them."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        self.model = base_folder(self.base)
        adapters = [save_adapter(self.model, folder / f"a{at}", rank=4, seed=at) for at in range(3)]
        self.whose: list[ServedAdapter | None] = [None, *adapters]
        peft = Peft(self.model)
        self.expected = {who: peft.says(who, PROMPT, LONG) for who in self.whose}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("ahead"))


@pytest.fixture
def num_ahead(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A GPU's way; how many rows each pass ahead had, of which so many with a token of the last."""
    found: list[tuple[int, int]] = []
    compute = Passes.run

    def run(passes: Passes, parts: Any, follows: Any = None) -> Any:
        found.extend([] if follows is None else [(len(parts), len(follows.rows))])
        return compute(passes, parts, follows)

    monkeypatch.setattr(Passes, "run", run)
    monkeypatch.setattr(attention, "flash", _flash_by_numbers)
    monkeypatch.setattr(Graphs, "_capture", lambda graphs, key: _Again(graphs, key))
    monkeypatch.setattr(base, "keep_as_rows", lambda bank, groups: None)
    return found


async def _started(served: Served, **embedded: Any) -> EmbeddedEngine:
    engine = EmbeddedEngine(settings(served.base, fuse=False, **embedded))
    await engine.start()
    _as_a_gpu(engine)
    return engine


@pytest.mark.parametrize("ahead", [True, False])
def test_answers_are_pefts_where_some_stop_and_adapters_come_meanwhile(
    served: Served, num_ahead: list[tuple[int, int]], ahead: bool
) -> None:
    """Ten rows are filled up to the sixteen of an adapter's trial, which is the same graph."""

    async def ask() -> list[Piece]:
        engine = await _started(served, ahead=ahead)
        wanted = [
            request(f"{at}", PROMPT, served.whose[at % 2], max_tokens=LONG - at) for at in range(8)
        ]
        for at in (3, 9):
            stop = served.expected[served.whose[at % 2]][at]
            wanted.append(
                request(f"s{at}", PROMPT, served.whose[at % 2], max_tokens=LONG, stop_ids=(stop,))
            )
        tasks = [asyncio.ensure_future(answer(engine, one)) for one in wanted]
        stream = engine.generate(request("first", PROMPT, max_tokens=LONG))
        await anext(stream)
        for who in served.whose[2:]:
            late = request(f"late {who}", PROMPT, who, max_tokens=LONG)
            tasks.append(asyncio.ensure_future(answer(engine, late)))
            await anext(stream)
        await stream.aclose()
        wanted += [request("", PROMPT, who, max_tokens=LONG) for who in served.whose[2:]]
        found = [await task for task in tasks]
        for one, piece in zip(wanted, found, strict=True):
            expected = served.expected[one.adapter][: one.sampling.max_tokens]
            for stop in one.sampling.stop_ids:
                expected = expected[: expected.index(stop) + 1]
            assert list(piece.token_ids) == expected
        await engine.stop()
        return found

    asyncio.run(ask())
    assert any(rows > 8 for rows, _ in num_ahead) == ahead
    assert any(rows > following for rows, following in num_ahead) == ahead  # and a prompt


def test_a_row_whose_logits_are_not_finite_fails_alone_where_its_next_pass_is_under_way(
    served: Served, num_ahead: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token comes of it, and none is looked up for it."""
    sick = served.expected[None][5]
    compute = Passes._pass

    def spoiled(passes: Passes, *told: Any, **more: Any) -> Any:
        outcome = compute(passes, *told, **more)
        tensors = passes.layout.tensors
        last = tensors["last"][: len(outcome.tokens_r)].long()
        is_sick = (tensors["ids"][last] == sick) & (tensors["slots"][last] < 0)
        outcome.tokens_r[is_sick] = BAD
        return outcome

    monkeypatch.setattr(Passes, "_pass", spoiled)

    async def ask() -> None:
        engine = await _started(served)
        well = request("well", PROMPT, served.whose[1], max_tokens=LONG)
        found = await asyncio.gather(
            answer(engine, request("sick", PROMPT, max_tokens=LONG)),
            answer(engine, well),
            return_exceptions=True,
        )
        assert isinstance(found[0], EngineError) and "not finite" in str(found[0])
        assert isinstance(found[1], Piece)
        assert list(found[1].token_ids) == served.expected[well.adapter]
        await engine.stop()

    asyncio.run(ask())
    assert num_ahead


_WAYS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.0},
    {"temperature": 1.5, "top_k": 20},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.8},
]
"""Of requests that need nothing of a pass but tokens."""


def test_drawn_tokens_are_those_of_passes_that_wait(
    served: Served, num_ahead: list[tuple[int, int]]
) -> None:
    """Each alone with an engine that waits; together, greedy ones among them, some of which end by
    a stop token with a row in vain, and each of which is asked again; and beside one whose
    penalties the host alone knows, for as long as it runs."""
    wanted = [
        request(f"{at}", PROMPT, served.whose[at % 4], max_tokens=LONG - at, seed=at, **how)
        for at, how in enumerate([*_WAYS, *_WAYS])
    ]

    async def alone() -> list[Piece]:
        engine = await _started(served, ahead=False)
        found = [await answer(engine, one) for one in wanted]
        await engine.stop()
        return found

    async def together() -> None:
        engine = await _started(served)
        stopped = list[EngineRequest]()
        for one, piece in zip(wanted, expected, strict=True):
            sampling = replace(one.sampling, stop_ids=(piece.token_ids[9 + len(stopped) % 3],))
            stopped.append(replace(one, id=f"s{one.id}", sampling=sampling))
        for found, ask in zip(await answers(engine, stopped), stopped, strict=True):
            whole = expected[stopped.index(ask)].token_ids
            assert found.token_ids == whole[: whole.index(ask.sampling.stop_ids[0]) + 1]
        assert num_ahead
        host: dict[str, Any] = {"temperature": 1.0, "presence_penalty": 0.5, "seed": 77}
        beside = [request("host", PROMPT, max_tokens=12, **host), *wanted]
        before = len(num_ahead)
        assert [piece.token_ids for piece in (await answers(engine, beside))[1:]] == [
            piece.token_ids for piece in expected
        ]
        assert LONG - 20 < len(num_ahead) - before < LONG - 9
        await engine.stop()

    expected = asyncio.run(alone())
    assert not num_ahead
    drawn = [piece.token_ids[:20] for piece in expected if piece is not expected[2]]
    assert len(set(drawn)) == len(drawn)
    assert list(expected[2].token_ids) == served.expected[served.whose[2]][: LONG - 2]
    asyncio.run(together())


def test_who_needs_the_logits_is_not_ahead(
    served: Served, num_ahead: list[tuple[int, int]]
) -> None:
    """Beside a greedy one, which waits for it."""

    async def ask() -> None:
        engine = await _started(served)
        drawn: dict[str, Any] = {"max_tokens": 12, "logprobs": 2}
        both = [request("l", PROMPT, **drawn), request("g", PROMPT, max_tokens=6)]
        found = await asyncio.gather(*(answer(engine, one) for one in both))
        assert [len(piece.token_ids) for piece in found] == [12, 6]
        with torch.no_grad():
            ids = torch.tensor([PROMPT + served.expected[None][:12]])
            expected = served.model(ids).logits[0].log_softmax(-1)
        for at, told in enumerate(found[0].logprobs):
            own = float(expected[len(PROMPT) - 1 + at, told.token_id])
            assert told.logprob == pytest.approx(own, abs=1e-4)
        await engine.stop()

    asyncio.run(ask())
    assert num_ahead == []
