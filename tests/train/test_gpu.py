"""The three methods on a CUDA device: they learn, repeat, and cost what they should."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny import VOCABULARY, tiny_model
from tunefork.data.example import Encoded
from tunefork.evaluate.labels import score_apart, score_together
from tunefork.model.build import build
from tunefork.recipe import LoraSection, Method
from tunefork.train.loop import TrainResult, train
from tunefork.train.optim import LoraAdamW, ShadowAdamW

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


def _run(method: Method, architecture: str, **full: bool) -> tuple[PreTrainedModel, TrainResult]:
    model = tiny_model(architecture).to(DEVICE, torch.bfloat16)
    build(model, method, LoraSection(rank=4), seed=0)
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
def test_full_with_small_states_follows_fp32(full: dict[str, bool]) -> None:
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
