"""Passes with prompts, filled up to few sizes as for a CUDA graph: they say what exact ones say,
and what fills them up reaches nobody. On a CPU, with stand-ins for the kernel and for graphs."""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.embedded import base_folder, save_adapter, settings
from tests.serve.test_compiled_layers import kernel_by_numbers
from tests.serve.test_embedded import _Again, _flash_by_numbers
from tests.serve.test_graphs import _graphs, _Layers
from tests.serve.test_layout import part_of
from tunefork.model.bank import Bank
from tunefork.model.fused import FusedGroup
from tunefork.serve.engines import attention, base, flash, passes
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.graphs import Graphs, Key
from tunefork.serve.engines.layout import BASE
from tunefork.serve.engines.passes import Passes
from tunefork.serve.engines.regions import UNIT
from tunefork.serve.engines.slots import BankSlots

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def test_few_sizes_serve_all_passes_with_prompts() -> None:
    graphs = _graphs(None)
    sizes = [graphs.size(tokens) for tokens in range(1, 2113)]
    assert len(set(sizes)) == 12
    assert all(size and tokens <= size < 64 + 1.5 * tokens for tokens, size in enumerate(sizes, 1))
    assert sizes[-1] == 2112 and graphs.size(2113) is None
    graphs.is_on = False
    assert graphs.size(100) is None


@pytest.mark.parametrize(
    ("max_tokens", "max_rows"), [(16, 2), (16, 64), (48, 1), (2048, 256), (8192, 4096)]
)
def test_the_largest_size_takes_all_that_a_pass_may_have(max_tokens: int, max_rows: int) -> None:
    """And none of them fills up much more than another."""
    graphs = _graphs(None, max_tokens=max_tokens, max_rows=max_rows)
    most = min(max_tokens, 2048) + max_rows
    assert graphs.sizes == sorted(set(graphs.sizes)) and graphs.sizes[-1] == most
    filled = [(graphs.size(tokens) or 0) - tokens for tokens in range(1, most + 1)]
    assert min(filled) == 0 and max(filled) < 512


@pytest.mark.parametrize("fails_at", [1, 2])  # before the capture, and in it
def test_a_failed_capture_leaves_neither_its_stream_nor_its_memory(
    fails_at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stand-ins for CUDA's streams and graphs: PyTorch's `torch.cuda.graph` stays in its
    stream where the capture cannot be ended."""
    streams, waits, pools = ["usual"], [], []

    class Stream(str):
        def wait_stream(self, other: str) -> None:
            waits.append((str(self), other))

    @contextmanager
    def within(stream: str) -> Iterator[None]:
        streams.append(stream)
        try:
            yield
        finally:
            streams.pop()

    @contextmanager
    def capture(graph: Any, *, pool: Any, stream: str, capture_error_mode: str) -> Iterator[None]:
        pools.append(pool)
        streams.append(stream)
        yield
        streams.pop()

    class Captured:
        def pool(self) -> str:
            return f"memory {len(pools)}"

        def replay(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(streams[-1]))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: streams.append(str(stream)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Captured)
    graphs = _graphs(None)
    calls = []

    def run(key: Key) -> Any:
        calls.append(key)
        if key.tokens and streams[-1] == "side" and calls.count(key) == fails_at:
            raise ValueError("an operator synchronises")
        return "launched"

    graphs.run = run
    decoding = graphs.key(5, 100, has_adapters=True)
    graphs.outcome(decoding)
    with pytest.warns(UserWarning, match="a pass of 192 tokens could not be captured"):
        assert graphs.outcome(graphs.key_of_tokens(192)) == "launched"
    assert streams[-1] == "usual"
    assert waits[-1] == ("usual", "side")
    assert list(graphs.captured) == [decoding]
    graphs.outcome(graphs.key(5, 1000, has_adapters=True))
    assert pools == [None, *["memory 1"] * (fails_at == 2), None]


def test_without_graphs_no_memory_is_kept_for_any(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(graphs: Graphs, key: Key) -> _Again:
        if key.longest_k > 512 and not key.tokens:
            raise ValueError("an operator synchronises")
        return _Again(graphs, key)

    monkeypatch.setattr(Graphs, "_capture", capture)
    monkeypatch.setattr(_Again, "replay", lambda graph: None)
    graphs = _graphs(None)
    graphs.outcome(graphs.key_of_tokens(64))
    graphs.outcome(graphs.key(5, 100, has_adapters=True))
    with pytest.warns(UserWarning, match="a decoding pass could not be captured"):
        graphs.outcome(graphs.key(5, 1000, has_adapters=True))
    assert not graphs.is_on and not graphs.captured and graphs.size(64) is None


def test_decoding_passes_keep_what_passes_with_prompts_do_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(graphs: Graphs, key: Key) -> _Again:
        if key.tokens:
            raise ValueError("an operator synchronises")
        return _Again(graphs, key)

    monkeypatch.setattr(Graphs, "_capture", fails)
    monkeypatch.setattr(_Again, "replay", lambda graph: None)
    layers = _Layers()
    graphs = _graphs(layers)
    rows = graphs.key(5, 100, has_adapters=True)
    graphs.outcome(rows)
    key = graphs.key_of_tokens(192)
    with pytest.warns(UserWarning) as told:
        assert graphs.outcome(key) == ("launched", key)
    assert [str(one.message).split(" could")[0] for one in told] == [
        "embedded.compile: a pass of 192 tokens",
        "embedded.cuda_graphs: a pass of 192 tokens",
    ]
    assert graphs.is_on and graphs.compiled is not None and not layers.was_removed
    assert list(graphs.captured) == [rows]
    assert graphs.size(100) is None and graphs.captured_tokens == 0


def test_a_size_that_lacks_memory_is_served_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(graphs: Graphs, key: Key) -> _Again:
        if key.tokens in (512, 2112):
            raise torch.OutOfMemoryError("none left")
        return _Again(graphs, key)

    monkeypatch.setattr(Graphs, "_capture", capture)
    monkeypatch.setattr(_Again, "replay", lambda graph: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    graphs = _graphs(None)
    with pytest.warns(UserWarning, match=r"a pass of (512|2112) tokens.*none left"):
        graphs.warm(lambda key: None, has_slots=True)
    assert graphs.size(400) == 768 and graphs.size(1800) is None
    assert graphs.captured_tokens == 1792


MIXES: dict[str, list[tuple[int, int, int]]] = {
    "one prompt": [(61, 0, 3)],
    "decoding rows and prompts": [(1, 40, BASE), (1, 7, 1), (1, 8, 1), (90, 0, 3), (20, 0, BASE)],
    "a later piece": [(1, 3, 3), (64, 60, 1), (1, 0, 3)],
    "all rows and all tokens": [(1, at, (BASE, 1, 3)[at % 3]) for at in range(9)] + [(128, 5, 3)],
    "nobody's adapter": [(1, 3, BASE), (70, 0, BASE)],
}
"""(new tokens, position, slot) of each row."""


@pytest.mark.parametrize("few", [0, pytest.param(64, marks=pytest.mark.slow), 1000])
@pytest.mark.parametrize(("fuse", "groups"), [(False, ()), (True, ()), (True, (2,))])
def test_filled_passes_say_what_exact_ones_say(
    fuse: bool, groups: tuple[int, ...], few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes in turn, over a cache whose every place that no row should see is not a number; rows
    that decode read as others are, or apart, by `groups` of heads and by rows of adapters."""

    def join(_bank: Bank, groups: Sequence[FusedGroup]) -> None:
        for group in groups:
            group.join_banks()

    grouped = 0

    def kernel(*told: Any) -> torch.Tensor:
        nonlocal grouped
        grouped += not told[6]
        return kernel_by_numbers(*told)

    if groups:
        monkeypatch.setattr(flash, "_kernel", kernel)
        monkeypatch.setattr(passes, "MANY_ROWS", 10)
    else:
        monkeypatch.setattr(attention, "flash", _flash_by_numbers)
    monkeypatch.setattr(Graphs, "_capture", lambda graphs, key: _Again(graphs, key))
    monkeypatch.setattr(base, "keep_as_rows", join)
    model = base_folder(tmp_path / "base")
    adapters = [save_adapter(model, tmp_path / f"a{r}", rank=r, seed=r) for r in (4, 16)]

    def check(passes: Passes, caches: list[torch.Tensor]) -> None:
        passes.flash = passes.apart = True
        passes.groups, passes.layout.few = groups, few
        graphs = passes.graphs = passes.make_graphs(10, None)
        chosen = random.Random(0)
        for mix in [*MIXES.values(), *chosen.choices([*MIXES.values()], k=8)]:
            parts = [part_of(row, *one) for row, one in enumerate(mix)]
            written = [0]
            torch.manual_seed(0)
            for cache in caches:
                cache[UNIT:] = torch.nan
                for part in parts:
                    seen = cache[part.start : part.start + part.position]
                    seen.copy_(torch.randn_like(seen))
            for part in parts:
                first = part.start + part.position
                written += range(first, first + len(part.ids))
            before = [cache.clone() for cache in caches]
            found = passes.run(parts)
            logits_rv, tokens_r = found.logits_rv.clone(), found.tokens_r.clone()
            for cache, old in zip(caches, before, strict=True):
                is_kept = torch.ones(len(cache), dtype=torch.bool)
                is_kept[written] = False
                assert torch.equal(cache[is_kept].view(torch.int32), old[is_kept].view(torch.int32))
                assert cache[0].isfinite().all()
            passes.graphs = None
            exact = passes.run(parts)
            passes.graphs = graphs
            torch.testing.assert_close(logits_rv, exact.logits_rv)
            assert torch.equal(tokens_r, exact.tokens_r)
        assert {key.tokens for key in graphs.captured} == {64, 128, 138}
        assert bool(grouped) == bool(groups)

    async def run(check: Callable[..., Any]) -> None:
        fields = {"fuse": fuse, "prefill_tokens": 128, "max_requests": 10}
        engine = EmbeddedEngine(settings(tmp_path / "base", **fields))
        await engine.start()
        assert engine._parts is not None
        core = engine._parts.core
        assert core.tiers is not None and isinstance(core.tiers.slots, BankSlots)
        core.tiers.slots.takes_tiles = True
        for slot, adapter in zip((1, 3), adapters, strict=True):
            core.tiers.slots.load(slot, core.tiers.loading.read(adapter))
        with torch.inference_mode():
            check(core.passes, core.cache._pools())
        await engine.stop()

    asyncio.run(run(check))
