"""What an engine checks when it starts, by stand-ins: what is not as defined, or raises, is told
once and not used."""

import asyncio
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.serve.embedded import (
    Peft,
    answer,
    answers,
    base_folder,
    request,
    save_adapter,
    settings,
)
from tests.serve.test_compiled_layers import kernel_by_numbers
from tests.serve.test_embedded import _Again, _as_a_gpu, _flash_by_numbers
from tunefork.errors import AdapterError
from tunefork.kernels.bank_mixed import Mixed, add_mixed
from tunefork.kernels.bank_rows import Blocks, Rows
from tunefork.kernels.draw import draw, draw_by_sorting, draw_reference
from tunefork.model.bank import Bank
from tunefork.serve.engine import Piece
from tunefork.serve.engines import attention, base, checked, flash, passes, trial
from tunefork.serve.engines.cache import LayerShape
from tunefork.serve.engines.checked import Checks
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.graphs import Graphs
from tunefork.serve.engines.launched import Launched
from tunefork.serve.engines.layout import BASE, Part
from tunefork.serve.engines.regions import Regions
from tunefork.serve.engines.trial import ROOM, TRIED

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
VOCABULARY = 300


def _checks() -> Checks:
    return Checks(torch.device("cpu"), torch.float32)


def _raises(*_: Any, **__: Any) -> Any:
    raise RuntimeError("an illegal instruction\nat 0x0")


# Tokens


def _draws_otherwise(
    wrong: Sequence[int], logits_rv: Tensor, tokens_r: Tensor, told: Tensor
) -> None:
    draw_reference(logits_rv, tokens_r, told)
    tokens_r[list(wrong)] += 1


def test_what_draws_as_defined_draws() -> None:
    """Or one row otherwise, whose number lies between two tokens."""
    assert _checks().draw(VOCABULARY) is draw


@pytest.mark.parametrize(
    ("wrong", "is_used"),
    [([3], True), ([3, 4], False), ([12, 13, 14, 15], False), ([16], False), ([17], False)],
)
def test_a_kernel_that_draws_otherwise_is_not_used(
    wrong: list[int], is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one row, a greedy one, or one whose logits are not finite."""
    kernel = partial(_draws_otherwise, wrong)
    monkeypatch.setattr(checked, "draw", kernel)
    checks = _checks()
    if is_used:
        assert checks.draw(VOCABULARY) is kernel and not checks.without
        return
    with pytest.warns(UserWarning, match=r"does not say what its definition says.*sorts logits"):
        assert checks.draw(VOCABULARY) is draw_by_sorting
    assert checks.without == ["the kernel that draws tokens"]


def test_a_kernel_that_raises_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked, "draw", _raises)
    with pytest.warns(UserWarning, match=r"\(RuntimeError: an illegal instruction\);") as told:
        assert _checks().draw(VOCABULARY) is draw_by_sorting
    assert len(told) == 1
    monkeypatch.setattr(checked, "draw_by_sorting", _raises)
    with pytest.warns(UserWarning) as told:
        assert _checks().draw(VOCABULARY) is draw_reference
    assert ["sorts logits" in str(one.message) for one in told] == [True, False]
    assert "drawn row by row" in str(told[1].message)


def test_answers_are_the_same_by_what_takes_the_kernels_place(tmp_path: Path) -> None:
    """Drawn behind a pass, or once the host has changed their logits."""
    base_folder(tmp_path / "base")
    ways: list[dict[str, Any]] = [
        {"top_k": 20},
        {"top_p": 0.9, "presence_penalty": 0.5},
        {"logit_bias": {7: 2.0}, "top_k": 30, "top_p": 0.8},
        {"temperature": 0.0},
    ]

    async def run() -> list[list[Piece]]:
        engine = EmbeddedEngine(settings(tmp_path / "base"))
        await engine.start()
        assert engine._parts is not None
        found = []
        for by in (draw, draw_by_sorting):
            engine._parts.core.passes.draw_by = by
            wanted = [
                request(f"{at}", [20 + at], max_tokens=12, seed=at, **{"temperature": 1.0} | way)
                for at, way in enumerate(ways)
            ]
            found.append(await answers(engine, wanted))
        await engine.stop()
        return found

    by_kernel, by_sorting = asyncio.run(run())
    assert [one.token_ids for one in by_kernel] == [one.token_ids for one in by_sorting]


# Attention


def _layers(window: int | None = None) -> list[LayerShape]:
    return [LayerShape(torch.nn.Identity(), 2, 16, 16, 8, window)]


def test_rows_that_decode_are_read_apart_where_that_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def kernel(*told: Any) -> Tensor:
        calls.append(told)
        return kernel_by_numbers(*told)

    monkeypatch.setattr(flash, "_kernel", kernel)
    assert _checks().reads_apart(_layers(), {4})
    assert any(not told[6] and told[4] == 4 for told in calls)  # the heads of rows, grouped
    calls.clear()
    assert _checks().reads_apart(_layers(window=16), {4}) and not calls


def _sees_one_key_less(*told: Any) -> Tensor:
    query, keys, values, (starts_q, starts_k, used_r), longest_q, longest_k, is_causal, *how = told
    if not is_causal:
        used_r = used_r - 1
    rows = [starts_q, starts_k, used_r]
    return kernel_by_numbers(query, keys, values, rows, longest_q, longest_k, is_causal, *how)


@pytest.mark.parametrize("kernel", [_sees_one_key_less, _raises])
def test_rows_are_read_as_one_where_apart_is_not_the_same(
    kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And attention by the single call, which is right, is not given up for it."""
    monkeypatch.setattr(flash, "_kernel", kernel)
    checks = _checks()
    with pytest.warns(UserWarning, match="one call reads all rows"):
        assert not checks.reads_apart(_layers(), {4})
    assert checks.without == ["attention of decoding rows apart"]


# Adapters


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    base_folder(folder := tmp_path_factory.mktemp("checked") / "base")

    async def run() -> Bank:
        engine = EmbeddedEngine(settings(folder, max_rank=16))
        await engine.start()
        assert engine._parts is not None
        tiers = engine._parts.core.tiers
        await engine.stop()
        slots: Any = None if tiers is None else tiers.slots
        found: Bank = slots.bank
        return found

    return asyncio.run(run())


def test_adapters_of_few_tokens_are_added_where_that_is_as_defined(bank: Bank) -> None:
    assert _checks().mixes(bank, 12)


def _skips_the_last_tile(y: Tensor, u: Tensor, mixed: Mixed, *told: Any) -> None:
    counts = mixed.numbers_t3[:, 2]
    counts[int(counts.nonzero()[-1])] = 0
    add_mixed(y, u, mixed, *told)


def _forgets_a_row(y: Tensor, u: Tensor, mixed: Mixed, *told: Any) -> None:
    mixed.slot_m[2] = -1
    add_mixed(y, u, mixed, *told)


def _lets_others_in(y: Tensor, u: Tensor, mixed: Mixed, *told: Any) -> None:
    add_mixed(y, u, mixed, *told)
    y += 0 * u[:, -1:]  # the last slot's, which holds no numbers


def _touches_the_base(y: Tensor, u: Tensor, mixed: Mixed, *told: Any) -> None:
    mixed.slot_m[0] = 0
    add_mixed(y, u, mixed, *told)


@pytest.mark.parametrize(
    "kernel",
    [_skips_the_last_tile, _forgets_a_row, _lets_others_in, _touches_the_base, _raises],
)
def test_adapters_are_read_by_tiles_where_few_tokens_are_not_as_defined(
    bank: Bank, kernel: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked, "add_mixed", kernel)
    checks = _checks()
    with pytest.warns(UserWarning, match="read by tiles") as told:
        assert not checks.mixes(bank, 12)
    assert checks.without == ["adapters of few tokens"] and len(told) == 1


def _forgets_pairs(rows: Rows, y: Tensor, x: Tensor, blocks: Blocks) -> None:
    blocks.blocks_b4 = blocks.blocks_b4[blocks.blocks_b4[:, 2] != 2]
    _ADD(rows, y, x, blocks)


def _adds_to_all(rows: Rows, y: Tensor, x: Tensor, blocks: Blocks) -> None:
    _ADD(rows, y, x, blocks)
    y += 2**-10


_ADD = Rows.add


@pytest.mark.parametrize("add", [_ADD, _forgets_pairs, _adds_to_all, _raises])
def test_a_cpus_kernel_is_used_where_it_adds_as_defined(
    bank: Bank, add: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [layer.kept[0] for layer in bank.layers.values() if layer.kept is not None]
    kernels = [matrices.kernel for matrices in kept]
    if None in kernels:
        pytest.skip("needs a compiler")
    monkeypatch.setattr(Rows, "add", add)
    checks = _checks()
    try:
        if add is _ADD:
            checks.rows(bank)
        else:
            with pytest.warns(UserWarning, match="PyTorch's operations add them") as told:
                checks.rows(bank)
            assert len(told) == 1
        is_used = [matrices.kernel is not None for matrices in kept]
        assert checks.without == ([] if add is _ADD else ["the kernel for adapters"])
        assert all(is_used) if add is _ADD else not any(is_used)
        for matrices in kept:
            matrices.kernel = None
        checks = _checks()
        checks.rows(bank)  # no compiler: the log has told, and info() does
        assert checks.without == ["the kernel for adapters"]
    finally:
        for matrices, kernel in zip(kept, kernels, strict=True):
            matrices.kernel = kernel


# Captured passes


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Stand-ins for a GPU; of each call of attention, whether it groups heads of rows. While the
    list begins with True, such calls are wrong."""
    calls = [False]

    def kernel(*told: Any) -> Tensor:
        calls.append(not told[6])
        return kernel_by_numbers(*told) * (-1 if calls[0] and calls[-1] else 1)

    monkeypatch.setattr(flash, "_kernel", kernel)
    monkeypatch.setattr(passes, "MANY_ROWS", 10)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(Graphs, "_capture", lambda graphs, key: _Again(graphs, key))
    monkeypatch.setattr(base, "keep_as_rows", lambda bank, groups: None)
    yield calls


@pytest.mark.parametrize("fault", ["none", "apart", "all", "raises"])
def test_captured_passes_are_held_to_launched_ones(
    fault: str, grouped: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rows read apart, if that mends them; else prompts are launched."""
    base_folder(tmp_path / "base")

    async def run() -> None:
        fields = {"fuse": False, "max_requests": 10, "prefill_tokens": 128, "cache_tokens": 512}
        engine = EmbeddedEngine(settings(tmp_path / "base", **fields))
        await engine.start()
        graphs = _as_a_gpu(engine)
        assert engine._parts is not None
        core, checks = engine._parts.core, _checks()
        core.passes.apart, core.passes.groups = True, {2}
        core.passes.warm(has_slots=True)
        grouped[:] = [fault == "apart"]
        if fault in ("all", "raises"):
            wrong = _raises if fault == "raises" else lambda *_: False
            monkeypatch.setattr(checked, "_say_the_same", wrong)
        how = {"none": [], "apart": ["anew"]}.get(fault, ["anew", "launched"])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            checks.captured(core.passes, core.cache, has_slots=True)
        assert all(part in str(one.message) for part, one in zip(how, told, strict=True))
        assert len(checks.without) == len(how) and core.cache.regions.free == core.cache.total
        assert core.passes.apart == bool(core.passes.layout.few) == (fault == "none")
        assert bool(graphs.captured_tokens) == bool(graphs.sizes) == (len(how) < 2)
        await engine.stop()

    asyncio.run(run())


@pytest.mark.parametrize("max_requests", [2, 8])
def test_captured_passes_without_slots_are_held_to_launched_ones(
    max_requests: int, grouped: list[bool], tmp_path: Path
) -> None:
    """A merged replica's: they have no rows for trials, so the check has none either."""
    model = base_folder(tmp_path / "base")
    adapter = save_adapter(model, tmp_path / "a", rank=4, seed=1)

    async def run() -> None:
        fields = {"max_requests": max_requests, "prefill_tokens": 128, "cache_tokens": 512}
        engine = EmbeddedEngine(settings(tmp_path / "base", **fields), merged=adapter)
        await engine.start()
        assert engine._parts is not None
        core, checks = engine._parts.core, _checks()
        core.passes.flash = True
        core.passes.graphs = core.passes.make_graphs(max_requests, None)
        core.passes.warm(has_slots=False)
        checks.captured(core.passes, core.cache, has_slots=False)
        assert not checks.without and core.passes.graphs.captured_tokens
        await engine.stop()

    asyncio.run(run())


# Trials


class _Passes:
    """Captured passes of 64 and of 1,024 tokens; the trial's last row is off by `error` where
    `is_off` says so."""

    def __init__(self, error: float, is_off: Callable[[int, int], bool]) -> None:
        self.graphs, self.layout = SimpleNamespace(sizes=[64, 1024]), SimpleNamespace(few=560)
        self.max_rows, self.max_model_len, self.tries = 24, 4096, True
        self.error, self.is_off, self.seen = error, is_off, list[tuple[int, int]]()

    def run(self, parts: Sequence[Part]) -> Any:
        own, without = parts[-TRIED:]
        assert (own.slot, without.slot, own.ids) == (0, BASE, without.ids)
        tokens = sum(len(part.ids) for part in parts)
        self.seen.append((tokens, sum(len(part.ids) == 1 for part in parts)))
        logits_rv = torch.ones(len(parts), 7)
        if self.is_off(*self.seen[-1]):
            logits_rv[-1, 3] += self.error
        return SimpleNamespace(logits_rv=logits_rv)


def _cache() -> Any:
    return SimpleNamespace(regions=Regions(4096), total=4032, trial_start=4096)


def test_trials_may_ride_where_an_empty_slot_changes_nothing() -> None:
    passes, cache = _Passes(1e-6, lambda tokens, rows: False), _cache()
    assert _checks().rows_are_alike(passes, cache)  # type: ignore[arg-type]
    assert sorted(passes.seen) == [(64, 0), (64, 23), (1024, 0), (1024, 23)]
    assert cache.regions.free == cache.regions.total


@pytest.mark.parametrize("where", [(64, 0), (1024, 23)])
@pytest.mark.parametrize("error", [1e-6, float("nan")])
def test_trials_have_passes_of_their_own_where_rows_are_not_alike(
    where: tuple[int, int], error: float
) -> None:
    passes, checks, cache = _Passes(error, lambda *seen: seen == where), _checks(), _cache()
    with pytest.warns(UserWarning, match="a pass of its own"):
        assert not checks.rows_are_alike(passes, cache)  # type: ignore[arg-type]
    assert checks.without == ["trials in the passes of prompts"]
    assert cache.regions.free == cache.regions.total


def test_trials_have_passes_of_their_own_where_they_cannot_be_checked() -> None:
    passes: Any = SimpleNamespace(graphs=None)
    with pytest.warns(UserWarning, match="AssertionError"):
        assert not _checks().rows_are_alike(passes, _cache())


@pytest.mark.parametrize(("max_requests", "rows"), [(16, ROOM), (8, TRIED)])
def test_a_trial_by_itself_is_of_rows_that_decode(
    max_requests: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the way of a GPU, where captured passes have room for them; beside one that streams."""
    monkeypatch.setattr(attention, "flash", _flash_by_numbers)
    monkeypatch.setattr(Graphs, "_capture", lambda graphs, key: _Again(graphs, key))
    monkeypatch.setattr(base, "keep_as_rows", lambda bank, groups: None)
    model = base_folder(tmp_path / "base")
    well, ill = (save_adapter(model, tmp_path / f"a{at}", rank=4, seed=at) for at in range(2))
    prompt, seen = list(range(20, 40)), list[int]()
    verdict_of = trial.verdict_of

    def noted(launched: Launched, *rows: int) -> Any:
        seen.append(len(launched.logits_rv))
        launched.logits_rv[0] *= torch.nan if len(seen) == 2 else 1.0
        return verdict_of(launched, *rows)

    monkeypatch.setattr(trial, "verdict_of", noted)

    peft = Peft(model)

    async def run() -> None:
        fields = {"fuse": False, "max_requests": max_requests}
        engine = EmbeddedEngine(settings(tmp_path / "base", **fields))
        await engine.start()
        _as_a_gpu(engine)
        assert engine._parts is not None
        engine._parts.core.passes.rows_are_alike = False
        streams = asyncio.ensure_future(answer(engine, request("on", prompt, max_tokens=60)))
        found = await answer(engine, request("a", prompt, well, max_tokens=4))
        assert list(found.token_ids) == peft.says(well, prompt, 4)
        with pytest.raises(AdapterError, match="not finite"):
            await answer(engine, request("b", prompt, ill, max_tokens=4))
        assert list((await streams).token_ids) == peft.says(None, prompt, 60)
        await engine.stop()

    asyncio.run(run())
    assert seen == [rows, rows]
