"""The embedded engine against PEFT's `generate`, and what a request may ask of it."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.embedded import (
    answers,
    base_folder,
    greedy,
    request,
    save_adapter,
    settings,
)
from tunefork.serve.engine import ServedAdapter
from tunefork.serve.engines.embedded import EmbeddedEngine

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


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield Served(tmp_path_factory.mktemp("served"), "llama")


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3"])
def test_greedy_tokens_are_pefts(architecture: str, tmp_path: Path) -> None:
    """20 prompts over adapters of ranks 4, 16, 64 and the base, in one batch, fp32. Prompts are
    longer than a pass takes, so that some come in pieces while others decode."""
    served = Served(tmp_path, architecture)
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
    expected = [greedy(served.model, one.adapter, one.prompt_ids, 12) for one in wanted]
    assert [list(piece.token_ids) for piece in found] == expected
    assert {piece.finish_reason for piece in found} == {"length"}
    base = [greedy(served.model, None, one.prompt_ids, 12) for one in wanted]
    assert sum(a != b for a, b in zip(base, expected, strict=True)) >= 14  # adapters matter
