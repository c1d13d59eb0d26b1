"""The embedded engine on a GPU: kernels against their definitions, and graphs against launches."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.embedded import answers, base_folder, idle, request, save_adapter, settings
from tests.serve.test_ferry import deltas
from tests.tiny import tiny_model
from tunefork.model.add_bank import add_serving_bank
from tunefork.serve.engine import Piece, ServedAdapter
from tunefork.serve.engines import slots
from tunefork.serve.engines.adapter_file import HostAdapter
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.flash import flash_agrees
from tunefork.serve.engines.slots import BankSlots

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning:peft")]
PROMPT = [20, 60, 100, 140, 180, 220]


@pytest.mark.parametrize(("heads", "kv_heads", "features"), [(32, 8, 128), (9, 3, 64), (4, 4, 8)])
def test_flash_reads_regions_of_the_cache(heads: int, kv_heads: int, features: int) -> None:
    assert flash_agrees(heads, kv_heads, features, torch.bfloat16)


class Served:
    """A base and three adapters on the disk."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        model = base_folder(self.base)
        self.adapters: list[ServedAdapter | None] = [
            None,
            *(save_adapter(model, folder / f"a{r}", rank=r, seed=r + 1) for r in (4, 16, 64)),
        ]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("gpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_is_filled_as_on_a_cpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through pinned memory that is too small for all of it; other slots keep their bits."""
    monkeypatch.setattr(slots, "_FERRY_BYTES", 1)  # as much as the largest matrix may be
    found = {}
    for kind in ("cpu", "cuda"):
        model = tiny_model("llama").to(torch.bfloat16).to(kind)
        bank = add_serving_bank(model, slots=3, rank=16)
        filled = BankSlots(bank)
        torch.manual_seed(0)
        for slot, rank in ((0, 16), (1, 16), (1, 5)):
            filled.load(slot, HostAdapter(deltas(bank, rank, dtype), rank, 0))
        found[kind] = {path: layer.stacks for path, layer in bank.layers.items()}
    for path, stacks in found["cpu"].items():
        for one, other in zip(stacks, found["cuda"][path], strict=True):
            assert torch.equal(one, other.cpu()), path


def ask(served: Served, **embedded: Any) -> tuple[list[Piece], Any]:
    wanted = [
        request(f"{at}", PROMPT * (1 + at), served.adapters[at % 4], max_tokens=10, logprobs=0)
        for at in range(12)
    ]

    async def run() -> Any:
        engine = EmbeddedEngine(settings(served.base, **({"device": "cuda"} | embedded)))
        await engine.start()
        info = engine.info()
        found = await answers(engine, wanted)
        assert (await idle(engine)).healthy  # and every token of the cache is free again
        await engine.stop()
        return found, info

    found, info = asyncio.run(run())
    return found, info


def test_fp32_on_a_gpu_is_fp32_on_a_cpu(served: Served) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    assert [p.token_ids for p in ask(served, dtype="fp32")[0]] == [
        p.token_ids for p in ask(served, dtype="fp32", device="cpu")[0]
    ]


def test_a_stopped_engine_gives_pinned_memory_back(served: Served) -> None:
    """The ferry's, which adapters cross by."""
    ask(served, dtype="bf16")
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] < slots._FERRY_BYTES


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cuda_graphs": False},
        {"fuse": False},
        {"compile": False},
        {"base_storage": "nf4"},
        {"base_storage": "fp8"},
        {"prefill_tokens": 40},  # the longer prompts come in pieces
    ],
)
def test_bf16_says_what_fp32_says(served: Served, options: dict[str, Any]) -> None:
    """The first tokens' log probabilities, before rounding has led answers apart."""
    exact, _ = ask(served, dtype="fp32", device="cpu")
    found, info = ask(served, dtype="bf16", **options)
    assert info["attention"] == "flash"
    assert info["cuda_graphs"] == options.get("cuda_graphs", True)
    assert bool(info["captured_tokens"]) == info["cuda_graphs"]
    assert info["compiled"] == (options.get("cuda_graphs", True) and options.get("compile", True))
    is_rounded = "base_storage" in options
    for one, other in zip(found, exact, strict=True):
        if one.token_ids[0] == other.token_ids[0]:
            difference = abs(one.logprobs[0].logprob - other.logprobs[0].logprob)
            assert difference < (1.5 if is_rounded else 0.3)
    same = sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(found, exact, strict=True))
    assert same >= (5 if is_rounded else 9)
