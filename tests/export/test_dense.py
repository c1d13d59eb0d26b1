"""Whatever was trained, the plain model that it becomes has its logits, and loads as such."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_model
from tunefork.export.dense import merge_deltas
from tunefork.model.build import build
from tunefork.model.linear import LoraLinear
from tunefork.model.tokens import grow
from tunefork.recipe import LoraSection, Method

IDS = torch.arange(3, 40)[None]
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "whole": {"modules_to_save": ("embed_tokens",)},
    "whole-head": {"modules_to_save": ("lm_head", "norm")},
}


def _trained(name: str, options: dict[str, Any], method: Method, new_ids: tuple[int, ...]) -> Any:
    model = tiny_model(name)
    if new_ids:
        grow(model, new_ids)
    build(model, method, LoraSection(rank=4, **options), seed=0, new_ids=new_ids)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    assert any(isinstance(m, LoraLinear) for m in model.modules()) or options.get("dora")
    return model.requires_grad_(False).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3"])  # a tied head, one of its own
@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
@pytest.mark.parametrize("option", [*OPTIONS, "rows"])
def test_a_plain_model_has_the_same_logits(
    tmp_path: Path, name: str, method: Method, option: str
) -> None:
    new_ids = (96, 97) if option == "rows" else ()
    model = _trained(name, OPTIONS.get(option, {}), method, new_ids)
    ids = torch.cat([IDS, torch.tensor([new_ids], dtype=torch.int64)], dim=1)
    before = model(ids).logits
    merge_deltas(model, torch.float32)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    expected = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.state_dict().keys() == expected.keys()
    torch.testing.assert_close(loaded.eval()(ids).logits, before, rtol=1e-4, atol=1e-4)
