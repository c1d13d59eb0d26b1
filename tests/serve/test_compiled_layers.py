"""Compiled decoding layers say what layers as written say, by few forms for all layers and rows."""

import asyncio
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.serve.embedded import base_folder, save_adapter, settings
from tests.serve.test_embedded import _flash_by_numbers
from tunefork.model.bank import Bank
from tunefork.model.fused import FusedGroup
from tunefork.serve.engines import flash
from tunefork.serve.engines.compiled_layers import CompiledLayers
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.graphs import Graphs
from tunefork.serve.engines.layout import BASE, Part
from tunefork.serve.engines.reads import Reads
from tunefork.serve.engines.slots import BankSlots

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:peft")]


def kernel_by_numbers(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: list[Tensor],
    longest_q: int,
    longest_k: int,
    is_causal: bool,
    scale: float,
    window: int | None,
) -> Tensor:
    """`flash._kernel`: what it is told, taken at its word. Tokens of no row are no numbers."""
    starts_q, starts_k, used_r = rows
    if not is_causal and longest_q > 1:  # query heads in place of tokens: each sees everything
        groups, longest_q = longest_q, 1
        assert torch.equal(starts_q, groups * torch.arange(len(starts_q)))
        starts_q = torch.arange(len(query) + 1)
        starts_k, used_r = (told.repeat_interleave(groups) for told in (starts_k, used_r))
    used_r = used_r * (starts_q.diff() > 0)  # a row without tokens is not looked at
    reads = Reads(used_r, starts_q, starts_k, used_r, longest_q, longest_k)
    found = _flash_by_numbers(query, keys, values, reads, scale, window)
    found[: int(starts_q[0])] = torch.nan
    return found


def test_many_and_few_rows_with_and_without_adapters_and_prompts_are_all_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    def join(_bank: Bank, groups: Sequence[FusedGroup]) -> None:
        for group in groups:
            group.join_banks()

    monkeypatch.setattr(flash, "_kernel", kernel_by_numbers)
    monkeypatch.setattr("tunefork.serve.engines.base.keep_as_rows", join)
    base = tmp_path / "base"
    model = base_folder(base)
    adapter = save_adapter(model, tmp_path / "a", rank=8, seed=1)
    counter = CompileCounterWithBackend("eager")

    async def run() -> None:
        engine = EmbeddedEngine(settings(base, slots=5, max_rank=16))
        await engine.start()
        assert engine._parts is not None
        parts, passes = engine._parts, engine._parts.core.passes
        tiers = parts.core.tiers
        assert tiers is not None and isinstance(tiers.slots, BankSlots)
        tiers.slots.load(3, tiers.loading.read(adapter))
        for cache in parts.core.cache._pools():  # rows see tokens that none has computed
            cache.zero_()
        compiled = CompiledLayers(parts.model, partial(torch.compile, backend=counter))
        passes.flash = passes.apart = True
        passes.groups, graphs = {2}, passes.make_graphs(64, compiled)
        passes.graphs, graphs.is_on = graphs, False
        for rows in (48, 33, 2):
            for slots in ((BASE,), (3, BASE)):
                told = [
                    Part([20 + at], at % 5, 64 * (1 + at), slots[at % len(slots)], True)
                    for at in range(rows)
                ]
                compiled.is_on, passes.groups = False, ()
                expected = passes.run(told).logits_rv.clone()
                compiled.is_on, passes.groups = True, {2}
                torch.testing.assert_close(passes.run(told).logits_rv, expected)
        assert counter.frame_count == 4
        # Two forms for all sizes of passes with prompts, with and without adapters: of few tokens,
        # whose adapters are read row by row and by tiles, and of others.
        tiers.slots.takes_tiles = True
        monkeypatch.setattr(Graphs, "outcome", lambda graphs, key: graphs.run(key))
        graphs.is_on = True
        passes.layout.few = 128
        for lengths in ((100, 50, 1, 1, 1), (1, 1, 30), (61,), (1, 90)):
            for slots in ((BASE,), (3, BASE)):
                told = [
                    Part([20 + at] * new, at % 5, 256 * (1 + at), slots[at % len(slots)], True)
                    for at, new in enumerate(lengths)
                ]
                compiled.is_on, passes.graphs = False, None
                expected = passes.run(told).logits_rv.clone()
                compiled.is_on, passes.graphs = True, graphs
                torch.testing.assert_close(passes.run(told).logits_rv, expected)
        left = weakref.ref(parts.model)
        del parts, passes, tiers, graphs, compiled
        await engine.stop()
        assert left() is None  # nor does a compiled form keep the layers that it was made of

    with torch.inference_mode():
        asyncio.run(run())
    assert counter.frame_count == 6
