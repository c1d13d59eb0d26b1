"""Trials of adapters on a GPU: nobody waits for them, and what has no effect is found out."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serve.embedded import answer, base_folder, idle, request, save_adapter, settings, until
from tunefork.errors import AdapterError
from tunefork.serve.engine import Piece
from tunefork.serve.engines import trial
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.launched import Arriving, Launched
from tunefork.serve.engines.passes import Passes

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning:peft")]
PROMPT = [20, 60, 100, 140, 180, 220]


class Served:
    """A base, adapters, one without effect and one whose logits are not finite."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        model = base_folder(self.base)
        self.well = [save_adapter(model, folder / f"a{at}", rank=8, seed=at) for at in range(3)]
        self.dead, self.ill = (
            save_adapter(model, folder / name, rank=8, seed=7) for name in ("dead", "ill")
        )
        for one, by in ((self.dead, 1e-36), (self.ill, 1e25)):
            file = one.folder / "adapter_model.safetensors"
            save_file({k: t * by for k, t in load_file(file).items()}, file)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("gpu"))


async def _started(served: Served, **embedded: Any) -> EmbeddedEngine:
    options = {"device": "cuda", "dtype": "bf16", "max_requests": 64, "cache_tokens": 32768}
    engine = EmbeddedEngine(settings(served.base, **options | embedded))
    await engine.start()
    assert engine.info()["cuda_graphs"]
    return engine


def _has_running(engine: EmbeddedEngine, number: int) -> bool:
    return engine.state().running == number


def test_others_passes_are_launched_while_a_trial_is_under_way(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict takes long; those who stream have a pass behind it all the same."""
    under_way: list[Arriving] = []
    behind: list[int] = []
    verdict_of, compute = trial.verdict_of, Passes.run

    def slowly(launched: Launched, *rows: int) -> Arriving:
        torch.cuda._sleep(10**9)
        under_way.append(verdict_of(launched, *rows))
        return under_way[-1]

    def run(passes: Passes, parts: Any, *follows: Any) -> Launched:
        open_ = [one for one in under_way if one._is_there and not one._is_there.query()]
        launched = compute(passes, parts, *follows)
        # Counted where the host was not kept waiting for it either.
        behind.extend(len(parts) for one in open_ if one._is_there and not one._is_there.query())
        return launched

    monkeypatch.setattr(trial, "verdict_of", slowly)
    monkeypatch.setattr(Passes, "run", run)

    async def ask() -> None:
        engine = await _started(served)
        on = engine.generate(request("on", PROMPT, max_tokens=240))
        for _ in range(3):
            await anext(on)
        for adapter in (*served.well, served.dead):
            behind.clear()
            asked = answer(engine, request("late", PROMPT, adapter))
            [found] = await asyncio.gather(asked, return_exceptions=True)
            assert behind, adapter.id
            if adapter is served.dead:
                assert isinstance(found, AdapterError)
            else:
                assert isinstance(found, Piece) and len(found.token_ids) == 8
        await on.aclose()
        state = await idle(engine)
        assert len(state.resident) == len(served.well)
        await engine.stop()

    asyncio.run(ask())
    assert len(under_way) == 4


@pytest.mark.parametrize("options", [{}, {"compile": False}, {"base_storage": "fp8"}])
def test_bad_adapters_are_found_out_in_any_pass(served: Served, options: dict[str, Any]) -> None:
    """Beside any number of rows, and by prompts of any length: rows that should be alike are."""

    async def ask() -> None:
        engine = await _started(served, **options)
        for streams in (1, 5, 13, 30, 47, 55, 62):
            wanted = [
                request(f"{at}", PROMPT[at % 3 :], (None, *served.well)[at % 4], max_tokens=240)
                for at in range(streams)
            ]
            tasks = [asyncio.ensure_future(answer(engine, one)) for one in wanted]
            await until(partial(_has_running, engine, streams))
            for length in (1, 18, 60):
                for adapter in (served.dead, served.ill):
                    late = request("late", (PROMPT * 10)[:length], adapter)
                    with pytest.raises(AdapterError, match="is not served"):
                        await answer(engine, late)
            found = [await task for task in tasks]
            assert {len(piece.token_ids) for piece in found} == {240}
        state = await idle(engine)
        assert state.healthy and len(state.resident) == len(served.well)
        await engine.stop()

    asyncio.run(ask())
