"""The embedded engine over SmolLM2-135M: greedy tokens are PEFT's, ranks 4, 16, 64 and the base."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serve.embedded import Peft, answers, request, save_adapter, started
from tunefork.model.load import find
from tunefork.recipe import ModelSection
from tunefork.serve.engine import ServedAdapter

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:peft")]
BASE = "smollm2-135m-instruct"
TOPICS = ["rivers", "bread", "the moon", "chess", "wool", "steam", "maps", "bees", "salt", "paper"]


def test_greedy_tokens_are_pefts(tmp_path: Path) -> None:
    location = Path(find(ModelSection(id=BASE)).location)
    tokenizer: Any = AutoTokenizer.from_pretrained(location)
    model: Any = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32).eval()
    adapters: list[ServedAdapter | None] = [None]
    for rank in (4, 16, 64):
        # Weak enough to leave English: near-ties of garbage are decided by rounding.
        folder = tmp_path / f"rank{rank}"
        adapters.append(save_adapter(model, folder, rank=rank, seed=rank + 1, size=0.05))
    texts = [f"Tell me about {t}." for t in TOPICS] + [f"List facts on {t}:" for t in TOPICS]
    wanted = [
        request(
            str(at),
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            ),
            adapters[at % 4],
            max_tokens=24,
            ignore_eos=True,
        )
        for at, text in enumerate(texts)
    ]

    async def run() -> Any:
        async with started(location, max_model_len=512) as engine:
            return await answers(engine, wanted)

    found = asyncio.run(run())
    peft = Peft(model)
    expected = [peft.says(one.adapter, one.prompt_ids, 24) for one in wanted]
    assert [list(piece.token_ids) for piece in found] == expected
    alone = [peft.says(None, one.prompt_ids, 24) for one in wanted]
    assert sum(a != b for a, b in zip(alone, expected, strict=True)) >= 8  # adapters matter
