"""llama.cpp itself reads what is written, and answers with the same tokens.

Needs an interpreter with llama-cpp-python: TUNEFORK_LLAMA_CPP names it. Real weights, 20 prompts
and lower precisions are in benchmarks/export_clients.py.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.export_clients import TEXTS, ask
from tests.export.conftest import MakeRun
from tunefork.export.export import Options, export
from tunefork.export.merge import load_reference
from tunefork.export.proof import Gate
from tunefork.registry.opening import find_parts

PROMPTS = [list(range(start, start + 8)) for start in range(5, 45, 4)]
NUM_NEW = 32
GATE = Gate(num_tokens=128)


def _client() -> str:
    if (named := os.environ.get("TUNEFORK_LLAMA_CPP")) is not None:
        return named
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed, and TUNEFORK_LLAMA_CPP names no other")
    return sys.executable


@torch.inference_mode()
def _greedy(model: Any) -> list[list[int]]:
    answers = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NUM_NEW):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("form", ["gguf", "gguf-lora"])
def test_llama_cpp_gives_the_same_tokens(
    make_run: MakeRun, tmp_path: Path, architecture: str, form: Any
) -> None:
    client, run = _client(), make_run(dtype=torch.float32, architecture=architecture)
    out = tmp_path / "out"
    export(str(run), form, out, options=Options(kind="f32"), gate=GATE)
    is_lora = form == "gguf-lora"
    found = ask(
        client,
        {
            "model": str(out / ("base-f32.gguf" if is_lora else "model-f32.gguf")),
            "lora": str(out / "lora-f32.gguf") if is_lora else None,
            "prompts": PROMPTS,
            "num_new": NUM_NEW,
            "texts": TEXTS,
        },
    )
    assert found["tokens"] == _greedy(load_reference(find_parts(str(run))))
    base = tmp_path / f"base-{architecture}"
    assert found["tokens"] != _greedy(AutoModelForCausalLM.from_pretrained(base).eval())
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert found["texts"] == [tokenizer(text)["input_ids"] for text in TEXTS]
