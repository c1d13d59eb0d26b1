"""Captured passes with prompts on a GPU: they say what launched ones say, and touch no more."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.serve.embedded import base_folder, save_adapter, settings
from tests.serve.test_layout import APART
from tests.serve.test_prompt_passes import MIXES
from tunefork.serve.engines import assemble, slots
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.layout import BASE, Part
from tunefork.serve.engines.passes import Passes
from tunefork.serve.engines.regions import UNIT

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning:peft")]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"many_kv_heads": 1},  # rows that decode read apart, their heads grouped
    {"many_kv_heads": 1, "compile": False},
    {"widened": 0},  # adapters by tiles, also among few tokens
    {"widened": 0, "compile": False},
    {"architecture": "gemma3"},  # windows
    {"architecture": "gemma3", "many_kv_heads": 1},
    {"compile": False},
    {"fuse": False},
    {"base_storage": "nf4"},
    {"base_storage": "fp8"},
]


def _parts(mix: list[tuple[int, int, int]]) -> list[Part]:
    return [
        Part(
            [(11 * row + 5 * at) % 200 + 20 for at in range(new)],
            position,
            (row + 1) * APART,
            slot,
            wants_logits=True,
        )
        for row, (new, position, slot) in enumerate(mix)
    ]


def _poison(caches: list[Tensor], parts: list[Part]) -> None:
    """Only what the parts' rows have computed before is a number."""
    torch.manual_seed(0)
    for cache in caches:
        cache[UNIT:] = torch.nan
        for part in parts:
            seen = cache[part.start : part.start + part.position]
            seen.copy_(torch.randn_like(seen))


def _kept(cache: Tensor, parts: list[Part]) -> Tensor:
    """The bits of what no part writes, and of what is not there to fill passes up."""
    is_kept = torch.ones(len(cache), dtype=torch.bool, device=cache.device)
    is_kept[0] = False
    for part in parts:
        first = part.start + part.position
        is_kept[first : first + len(part.ids)] = False
    return cache[is_kept].view(torch.int16)


def _check(passes: Passes, caches: list[Tensor], rounding: float) -> None:
    graphs = passes.graphs
    assert graphs is not None and graphs.captured_tokens == 192
    before = set(graphs.captured)
    mixes = [mix for mix in MIXES.values() if sum(new for new, _, _ in mix) <= 192]
    for mix in [*mixes, *reversed(mixes)]:  # sizes in turn
        parts = _parts(mix)
        _poison(caches, parts)
        old = [_kept(cache, parts).clone() for cache in caches]
        outcome = passes.run(parts)
        found_rv, tokens_r = outcome.logits_rv.float(), outcome.tokens_r.clone()
        for cache, bits in zip(caches, old, strict=True):
            assert torch.equal(_kept(cache, parts), bits)
            assert cache[0].isfinite().all()
        _poison(caches, parts)
        sizes, graphs.sizes = graphs.sizes, []
        launched = passes.run(parts)
        exact_rv = launched.logits_rv.float()
        graphs.sizes = sizes
        assert found_rv.isfinite().all()
        limit = rounding * float(exact_rv.abs().max())
        torch.testing.assert_close(found_rv, exact_rv, rtol=0, atol=limit)
        # Where another token is the likeliest, it was as likely but for the rounding.
        own = exact_rv.gather(1, tokens_r[:, None])
        assert bool((exact_rv.max(dim=1, keepdim=True).values - own <= 2 * limit).all())
    assert set(graphs.captured) == before  # all were there when the engine started


def _differ(passes: Passes, caches: list[Tensor]) -> None:
    """Adapters change far more than rounding does: the comparison above can fail."""
    for slot in (1, 3):
        parts = [_parts([(61, 0, one)]) for one in (slot, BASE)]
        _poison(caches, parts[0])
        own, other = (passes.run(one).logits_rv.float().clone() for one in parts)
        assert float((own - other).abs().max()) > 0.2 * float(other.abs().max())


@pytest.mark.parametrize("options", OPTIONS)
def test_captured_passes_with_prompts_say_what_launched_ones_say(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"device": "cuda", "dtype": "bf16", "prefill_tokens": 128}
    fields = common | options
    many = fields.pop("many_kv_heads", assemble._MANY_KV_HEADS)
    widened = fields.pop("widened", slots._WIDENED)
    monkeypatch.setattr(assemble, "_MANY_KV_HEADS", many)
    monkeypatch.setattr(slots, "_WIDENED", widened)
    model = base_folder(tmp_path / "base", str(fields.pop("architecture", "llama")))
    adapters = [save_adapter(model, tmp_path / f"a{r}", rank=r, seed=r + 1) for r in (16, 64)]
    # Two layers in bf16, or with e4m3 inputs, rounded in other places.
    rounding = 0.15 if options.get("base_storage") == "fp8" else 0.06

    async def run() -> None:
        engine = EmbeddedEngine(settings(tmp_path / "base", **fields))
        await engine.start()
        assert engine.info()["captured_tokens"] == 192
        assert engine._parts is not None
        core = engine._parts.core
        assert core.tiers is not None and bool(core.passes.groups) == (many == 1)
        assert core.passes.layout.few > 192 if widened else core.passes.layout.few == 0
        assert core.passes.apart == bool(core.passes.groups)
        for slot, adapter in zip((1, 3), adapters, strict=True):
            core.tiers.slots.load(slot, core.tiers.loading.read(adapter))
        with torch.inference_mode():
            _check(core.passes, core.cache._pools(), rounding)
            _differ(core.passes, core.cache._pools())
        await engine.stop()

    asyncio.run(run())


def test_without_graphs_none_is_captured(tmp_path: Path) -> None:
    async def run() -> None:
        base_folder(tmp_path / "base")
        engine = EmbeddedEngine(settings(tmp_path / "base", device="cuda", cuda_graphs=False))
        await engine.start()
        assert engine.info()["captured_tokens"] == 0
        await engine.stop()

    asyncio.run(run())
