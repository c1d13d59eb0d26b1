"""What an engine checks when it starts on a GPU: all of it is used, and none of it is needed."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.embedded import answers, base_folder, request, save_adapter, settings
from tunefork.kernels.draw import draw, draw_by_sorting, draw_reference
from tunefork.serve.engine import EngineRequest, Piece, ServedAdapter
from tunefork.serve.engines import assemble
from tunefork.serve.engines.checked import Checks
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.flash import flash_agrees

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning:peft")]
PROMPT = [20, 60, 100, 140, 180, 220]


class Served:
    """A base and two adapters on the disk."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        model = base_folder(self.base)
        self.whose: list[ServedAdapter | None] = [
            None,
            *(save_adapter(model, folder / f"a{at}", rank=8, seed=at + 1) for at in range(2)),
        ]

    def wanted(self) -> list[EngineRequest]:
        """Greedy and sampled, of each."""
        return [
            request(
                f"{at}",
                PROMPT[at % 3 :] * (1 + at % 4),
                self.whose[at % 3],
                max_tokens=40,
                temperature=(0.0, 1.0)[at % 2],
                top_k=(0, 30)[at % 4 // 2],
                seed=at,
            )
            for at in range(40)
        ]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("gpu"))


def _asked(served: Served) -> tuple[list[Piece], dict[str, Any]]:
    async def run() -> Any:
        engine = EmbeddedEngine(settings(served.base, device="cuda", dtype="bf16"))
        await engine.start()
        try:
            return await answers(engine, served.wanted()), dict(engine.info())
        finally:
            await engine.stop()

    found: tuple[list[Piece], dict[str, Any]] = asyncio.run(run())
    return found


@pytest.fixture
def many_kv_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small base's heads are grouped too."""
    monkeypatch.setattr(assemble, "_MANY_KV_HEADS", 1)


def test_all_is_used(served: Served, many_kv_heads: None) -> None:
    assert _asked(served)[1]["without"] == "nothing"


def _no(*_: Any, **__: Any) -> bool:
    return False


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("_draws", "the kernel that draws tokens, drawing by sorting"),
        ("reads_apart", ""),
        ("_adds", "adapters of few tokens"),
        ("rows_are_alike", ""),
    ],
)
def test_nothing_of_it_is_needed(
    served: Served, many_kv_heads: None, method: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens part where logits are rounded otherwise, but not at once."""
    plain, _ = _asked(served)
    monkeypatch.setattr(Checks, method, _no)
    if what:
        with pytest.warns(UserWarning, match="does not say what its definition says"):
            found, info = _asked(served)
        assert info["without"] == what
    else:
        found, info = _asked(served)
    same = sum(a.token_ids[:4] == b.token_ids[:4] for a, b in zip(plain, found, strict=True))
    assert same >= 36 and {len(piece.token_ids) for piece in found} == {40}


@pytest.mark.parametrize("by", [draw_by_sorting, draw_reference])
def test_tokens_are_drawn_without_the_kernel(by: Callable[..., None]) -> None:
    """Sorting waits for nothing."""
    checks = Checks(torch.device("cuda"), torch.bfloat16)
    assert checks._draws(by, 128_256)
    if by is draw_by_sorting:
        logits = torch.randn(64, 128_256, device="cuda").bfloat16()
        told = torch.tensor([[row, 1.0, 50, 0.9, 0.5] for row in range(64)]).double().pin_memory()
        tokens = logits.argmax(-1)
        by(logits, tokens, told)
        torch.cuda.synchronize()
        torch.cuda._sleep(2 * 10**9)
        by(logits, tokens, told)
        assert not torch.cuda.current_stream().query()


def test_all_holds_in_an_8b_models_sizes() -> None:
    checks = Checks(torch.device("cuda"), torch.bfloat16)
    assert checks._draws(draw, 128_256)
    for sizes in ((4096, 1024, 1024), (4096,), (14336, 14336)):
        for rank in (16, 64):
            assert checks._adds(sizes, rank, 66)
    assert flash_agrees(32, 8, 128, torch.bfloat16, apart=True)
