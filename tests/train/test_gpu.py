"""The three methods on a CUDA device: they learn, repeat, and cost what they should."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tests.tiny import VOCABULARY, tiny_model
from tunefork.data.example import Encoded
from tunefork.evaluate.labels import score_apart, score_together
from tunefork.model.build import build
from tunefork.recipe import LoraSection, Method
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.checkpoints import Checkpoints, Policy
from tunefork.train.deterministic import deterministic, prepare
from tunefork.train.loop import TrainResult, train
from tunefork.train.optim import ShadowAdamW
from tunefork.train.recovery import OnFault
from tunefork.train.state import digest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def _examples() -> list[Encoded]:
    draw = np.random.default_rng(0)
    found = []
    for number, length in enumerate(draw.integers(5, 60, 32)):
        ids = draw.integers(3, VOCABULARY, length).astype(np.int32)
        found.append(Encoded(f"f:{number}", ids, np.arange(length) >= 3, prompt_length=3))
    return found


def _run(
    method: Method,
    architecture: str,
    *,
    dropout: float = 0.0,
    options: dict[str, Any] | None = None,
    **full: bool,
) -> tuple[PreTrainedModel, TrainResult]:
    model = tiny_model(architecture).to(DEVICE, torch.bfloat16)
    build(model, method, LoraSection(rank=4, dropout=dropout), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: LoraAdamW | ShadowAdamW
    if method is Method.FULL:
        settings = {"keep_shadows": True, "eight_bit": False} | full
        optimizer = ShadowAdamW(trained, betas=(0.9, 0.999), weight_decay=0.0, **settings)
    else:
        optimizer = LoraAdamW(trained, betas=(0.9, 0.999), weight_decay=0.0)
    result = train(
        model,
        _examples(),
        [list(range(start, start + 8)) for start in (0, 8, 16, 24)] * 4,
        optimizer,
        learning_rates=[1e-2] * 16,
        micro_batch_tokens=128,
        packing=True,
        pad_id=0,
        max_grad_norm=1.0,
        seed=0,
        **(options or {}),
    )
    return model, result


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "phi3", "gpt_neox"])
@pytest.mark.parametrize("method", Method)
def test_it_learns(method: Method, architecture: str) -> None:
    _, result = _run(method, architecture)
    first, last = result.steps[:4], result.steps[-4:]
    assert sum(r.loss for r in last) < sum(r.loss for r in first) - 0.2
    assert 0 < result.peak_memory_bytes <= torch.cuda.get_device_properties(DEVICE).total_memory


@pytest.mark.parametrize("full", [{"keep_shadows": False}, {"eight_bit": True}])
def test_full_with_small_states_follows_fp32(full: dict[str, Any]) -> None:
    _, exact = _run(Method.FULL, "llama")
    _, small = _run(Method.FULL, "llama", **full)
    assert [r.loss for r in small.steps] == pytest.approx([r.loss for r in exact.steps], rel=0.1)


@pytest.mark.parametrize("method", Method)
def test_two_runs_are_identical(method: Method) -> None:
    assert _run(method, "llama")[1].steps == _run(method, "llama")[1].steps


def test_labels_scored_together_are_scored_as_defined() -> None:
    model = tiny_model("llama").to(DEVICE).eval()
    answers = [[5, 6, 7], [5, 8], [9, 6]]
    options = {"max_tokens": 64, "pad_id": 0}
    together = score_together(model, _examples(), answers, **options)
    apart = score_apart(model, _examples(), answers, **options)
    np.testing.assert_allclose(together, apart, atol=1e-4)


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": Method.LORA},
    "lora with dropout": {"method": Method.LORA, "dropout": 0.3},
    "qlora": {"method": Method.QLORA},
    "full": {"method": Method.FULL},
    "full bf16": {"method": Method.FULL, "keep_shadows": False},
    "full 8bit": {"method": Method.FULL, "eight_bit": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    prepare(True)
    whole = Checkpoints(tmp_path / "whole", {}, {}, Policy(every_steps=1, keep=1))
    cut = Checkpoints(tmp_path / "cut", {}, {}, Policy(every_steps=5, keep=1))
    with deterministic(True):
        _run(architecture="llama", options={"checkpoints": whole, "stop_after": 14}, **KINDS[kind])
        _run(architecture="llama", options={"checkpoints": cut, "stop_after": 7}, **KINDS[kind])
        found = cut.newest()
        assert found is not None and found.facts.step == 7
        options = {"checkpoints": cut, "start": found, "stop_after": 14}
        _run(architecture="llama", options=options, **KINDS[kind])
    ends = [checkpoints.read(14).tensors for checkpoints in (whole, cut)]
    assert digest(ends[0]) == digest(ends[1])


def test_a_lack_of_memory_shrinks_the_micro_batch_and_changes_no_gradient() -> None:
    def run(limit: int, on_fault: OnFault) -> TrainResult:
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=1024,
            intermediate_size=2048,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(DEVICE, torch.bfloat16)
        build(model, Method.LORA, LoraSection(rank=4), seed=0)
        trained = [p for p in model.parameters() if p.requires_grad]
        draw = np.random.default_rng(0)
        rows = [draw.integers(3, 512, 1024).astype(np.int32) for _ in range(16)]
        return train(
            model,
            [
                Encoded(f"f:{n}", ids, np.arange(1024) >= 3, prompt_length=3)
                for n, ids in enumerate(rows)
            ],
            [list(range(16))] * 2,
            LoraAdamW(trained, betas=(0.9, 0.999), weight_decay=0.0),
            learning_rates=[1e-3] * 2,
            micro_batch_tokens=limit,
            packing=False,
            pad_id=0,
            max_grad_norm=1.0,
            seed=0,
            on_fault=on_fault,
        )

    small = run(4096, OnFault())
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    events: list[Any] = []
    torch.cuda.set_per_process_memory_fraction(1.5 * small.peak_memory_bytes / total, DEVICE)
    try:
        shrunk = run(16_384, OnFault(out_of_memory="shrink", on_event=events.append))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    assert [event.field for event in events] and events[0].before == 16_384
    losses = [[r.loss for r in result.steps] for result in (small, shrunk)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    norms = [[r.grad_norm for r in result.steps] for result in (small, shrunk)]
    assert norms[1] == pytest.approx(norms[0], rel=2e-2)
