"""The embedded engine against PEFT's `generate`, and what a request may ask of it."""

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.serve.embedded import (
    Peft,
    answers,
    base_folder,
    request,
    save_adapter,
    settings,
)
from tunefork.errors import EngineDeadError
from tunefork.kernels.bank_read import add_own
from tunefork.model import joint_banks
from tunefork.model.bank import Bank
from tunefork.model.fused import FusedGroup
from tunefork.serve.engine import ServedAdapter
from tunefork.serve.engines import attention, base
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.graphs import Graphs, Key
from tunefork.serve.engines.layout import STEP, Layout
from tunefork.serve.engines.passes import Outcome
from tunefork.serve.engines.reads import Reads
from tunefork.serve.engines.slots import BankSlots
from tunefork.serve.engines.trial import TRIED

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
RANKS = (4, 16, 64)


class Served:
    """A base, adapters of several ranks over it, and prompts."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self.base = folder / "base"
        self.model = base_folder(self.base, architecture)
        self.adapters: list[ServedAdapter] = [
            save_adapter(self.model, folder / f"rank{rank}", rank=rank, seed=rank + at)
            for at, rank in enumerate(RANKS)
        ]
        chosen = random.Random(0)
        self.prompts = [
            [chosen.randrange(13, 300) for _ in range(chosen.randrange(1, 40))] for _ in range(20)
        ]
        self.expected = partial(Peft(self.model).says, new=12)


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    """Of an architecture; made once."""
    return cache(lambda architecture: Served(tmp_path_factory.mktemp(architecture), architecture))


@pytest.fixture(scope="module")
def served(serve: Callable[[str], Served]) -> Served:
    return serve("llama")


@pytest.mark.parametrize(
    "architecture", ["llama", "gemma3", pytest.param("qwen3", marks=pytest.mark.slow)]
)
def test_greedy_tokens_are_pefts(architecture: str, serve: Callable[[str], Served]) -> None:
    """20 prompts over adapters of ranks 4, 16, 64 and the base, in one batch, fp32. Prompts are
    longer than a pass takes, so that some come in pieces while others decode."""
    served = serve(architecture)
    whose: list[ServedAdapter | None] = [None, *served.adapters]
    wanted = [
        request(str(at), prompt, whose[at % 4], max_tokens=12, ignore_eos=True)
        for at, prompt in enumerate(served.prompts)
    ]

    async def run() -> Any:
        engine = EmbeddedEngine(settings(served.base, prefill_tokens=16))
        await engine.start()
        try:
            return await answers(engine, wanted)
        finally:
            await engine.stop()

    found = asyncio.run(run())
    expected = [served.expected(one.adapter, one.prompt_ids) for one in wanted]
    assert [list(piece.token_ids) for piece in found] == expected
    assert {piece.finish_reason for piece in found} == {"length"}
    base = [served.expected(None, one.prompt_ids) for one in wanted]
    assert sum(a != b for a, b in zip(base, expected, strict=True)) >= 14  # adapters matter


def _flash_by_numbers(
    query_nhe: Tensor,
    keys_ske: Tensor,
    values_ske: Tensor,
    reads: Reads,
    scale: float,
    window: int | None,
) -> Tensor:
    """What the GPU's kernel is told, taken at its word."""
    out_nhe = torch.zeros_like(query_nhe)
    for row, used in enumerate(reads.used_r.tolist()):
        start = int(reads.starts_k[row])
        first, last = int(reads.starts_q[row]), int(reads.starts_q[row + 1])
        new, longest_q = last - first, reads.longest_q or len(query_nhe)
        assert (new > 0 or not used) and new <= longest_q and used <= reads.longest_k
        keys, values = keys_ske[start : start + used], values_ske[start : start + used]
        at, by = torch.arange(used - new, used)[:, None], torch.arange(used)
        seen = by <= at if window is None else (by <= at) & (at - by < window)
        groups = query_nhe.shape[1] // keys.shape[1]
        scores = torch.einsum(
            "qhe,khe->hqk", query_nhe[first:last], keys.repeat_interleave(groups, 1)
        )
        weights = (scores * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        out_nhe[first:last] = torch.einsum(
            "hqk,khe->qhe", weights, values.repeat_interleave(groups, 1)
        )
    return out_nhe


class _Again:
    """A graph that runs the pass again, over the numbers that then lie there."""

    def __init__(self, graphs: Graphs, key: Key) -> None:
        self.run, self.key = graphs.run, key
        self.outcome: Outcome = self.run(key)

    def replay(self) -> None:
        found = self.run(self.key)
        self.outcome.logits_rv.copy_(found.logits_rv)
        self.outcome.tokens_r.copy_(found.tokens_r)

    @property
    def graph(self) -> "_Again":
        return self


def _as_a_gpu(engine: EmbeddedEngine) -> Graphs:
    """Has `engine` take the way of a GPU."""
    assert engine._parts is not None
    core = engine._parts.core
    assert core.tiers is not None and isinstance(core.tiers.slots, BankSlots)
    passes, slots = core.passes, core.tiers.slots
    passes.flash = passes.rows_are_alike = core.overlaps = slots.takes_tiles = True
    tokens, rows = passes.max_tokens + passes.max_rows + STEP, passes.max_rows + TRIED + 1
    passes.layout = Layout(tokens, rows, passes.device, few=slots.few)
    graphs = passes.graphs = passes.make_graphs(core.scheduler.max_requests, None)
    return graphs


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_gpus_way_by_stand_ins(
    architecture: str, serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filled-up passes, static numbers, tiles of tokens, texts one pass late: on a CPU, with
    a stand-in for the kernel and for graphs. The answers are PEFT's."""
    served = serve(architecture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(attention, "flash", _flash_by_numbers)
    monkeypatch.setattr(Graphs, "_capture", lambda graphs, key: _Again(graphs, key))
    monkeypatch.setattr(base, "keep_as_rows", lambda bank, groups: None)
    whose: list[ServedAdapter | None] = [None, *served.adapters]
    wanted = [
        request(str(at), prompt, whose[at % 4], max_tokens=12, ignore_eos=True)
        for at, prompt in enumerate(served.prompts)
    ]

    async def run() -> Any:
        engine = EmbeddedEngine(settings(served.base, prefill_tokens=40, fuse=False))
        await engine.start()
        graphs = _as_a_gpu(engine)
        assert engine._parts is not None
        engine._parts.core.passes.warm(has_slots=True)
        try:
            found = await answers(engine, wanted)
            assert sum(key.tokens == 0 for key in graphs.captured) == 20
            assert {key.tokens for key in graphs.captured} == {0, 64, 104}
            return found
        finally:
            await engine.stop()

    found = asyncio.run(run())
    expected = [served.expected(one.adapter, one.prompt_ids) for one in wanted]
    assert [list(piece.token_ids) for piece in found] == expected


def test_an_adapter_is_tried_in_the_pass_of_its_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of q alone changes only what tokens see of those before them: it is served as well."""
    model = base_folder(tmp_path / "base")
    adapter = save_adapter(model, tmp_path / "q", rank=4, seed=0, targets=["q_proj"])
    monkeypatch.setattr(attention, "flash", _flash_by_numbers)
    monkeypatch.setattr(Graphs, "_capture", lambda graphs, key: _Again(graphs, key))
    monkeypatch.setattr(base, "keep_as_rows", lambda bank, groups: None)
    prompt = list(range(20, 40))

    async def run() -> Any:
        engine = EmbeddedEngine(settings(tmp_path / "base", fuse=False))
        await engine.start()
        graphs = _as_a_gpu(engine)
        try:
            return await answers(engine, [request("a", prompt, adapter, max_tokens=4)]), graphs
        finally:
            await engine.stop()

    [found], graphs = asyncio.run(run())
    assert list(found.token_ids) == Peft(model).says(adapter, prompt, 4)
    assert [key.tokens for key in graphs.captured] == [64, 0]  # 20 and the trial's 16; then rows


def test_fused_layers_take_the_same_way(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above with q, k, v and gate, up as one product each, and their adapters' A as well."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(attention, "flash", _flash_by_numbers)
    monkeypatch.setattr(Graphs, "_capture", lambda graphs, key: _Again(graphs, key))
    whose: list[ServedAdapter | None] = [None, *served.adapters]
    wanted = [
        request(str(at), prompt, whose[at % 4], max_tokens=12, ignore_eos=True)
        for at, prompt in enumerate(served.prompts)
    ]
    products: Counter[int] = Counter()

    def counted(*told: Any) -> None:
        products[len(told[4])] += 1
        add_own(*told)

    monkeypatch.setattr(joint_banks, "add_own", counted)

    def join(_bank: Bank, groups: Sequence[FusedGroup]) -> None:
        for group in groups:
            group.join_banks()

    monkeypatch.setattr(base, "keep_as_rows", join)

    async def run() -> Any:
        engine = EmbeddedEngine(settings(served.base, prefill_tokens=40))
        await engine.start()
        _as_a_gpu(engine)
        try:
            return await answers(engine, wanted)
        finally:
            await engine.stop()

    found = asyncio.run(run())
    expected = [served.expected(one.adapter, one.prompt_ids) for one in wanted]
    assert [list(piece.token_ids) for piece in found] == expected
    assert set(products) == {1, 2, 3}  # o and down; gate and up; q, k and v


def test_a_request_is_told_of_an_engine_that_stopped_meanwhile(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        engine = EmbeddedEngine(settings(served.base))
        await engine.start()

        async def stops(*_: Any) -> None:
            await engine.stop()

        monkeypatch.setattr(engine, "_matcher", stops)
        async with asyncio.timeout(5):
            with pytest.raises(EngineDeadError):
                await answers(engine, [request("1", served.prompts[0], None, max_tokens=2)])

    asyncio.run(run())


def test_passes_have_no_rows_for_trials_that_are_none_of_theirs(
    serve: Callable[[str], Served],
) -> None:
    """A captured pass with prompts computes all rows that it has, and logits of all but one."""

    served = serve("llama")

    async def rows(merged: ServedAdapter | None) -> int:
        engine = EmbeddedEngine(settings(served.base, max_requests=5), merged=merged)
        await engine.start()
        try:
            assert engine._parts is not None
            return engine._parts.core.passes.layout.rows
        finally:
            await engine.stop()

    assert asyncio.run(rows(None)) == 5 + TRIED + 1
    assert asyncio.run(rows(served.adapters[0])) == 5 + 1  # has no slots


@pytest.mark.parametrize(("before", "then"), [(5e-3, 5e-4), (1e-4, 1e-4)])
def test_other_threads_let_an_engines_have_the_interpreter(
    served: Served, before: float, then: float
) -> None:
    async def starts() -> None:
        engine = EmbeddedEngine(settings(served.base))
        await engine.start()
        await engine.stop()

    usual = sys.getswitchinterval()
    try:
        sys.setswitchinterval(before)
        asyncio.run(starts())
        assert sys.getswitchinterval() == pytest.approx(then, abs=2e-6)
    finally:
        sys.setswitchinterval(usual)
