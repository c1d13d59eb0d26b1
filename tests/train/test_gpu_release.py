"""Gradient release on a CUDA device: what memory it saves, and that it trains the same."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tunefork.data.example import Encoded
from tunefork.recipe import DataSection, FullSection, Method, ModelSection, Recipe, TrainSection
from tunefork.train.deterministic import deterministic, prepare
from tunefork.train.engine import prepare as prepare_engine
from tunefork.train.loop import TrainResult, train
from tunefork.train.method import make_optimizer, make_release
from tunefork.train.state import digest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda", 0)
# Layers together have many times the largest weight, as those of a model worth releasing for do.
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=12,
    num_attention_heads=16,
    tie_word_embeddings=False,
)


def _run(*, releases: bool, compiles: bool, **full: Any) -> tuple[str, TrainResult, int]:
    """The weights' digest, what the run did, and the bytes of all gradients."""
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    model.requires_grad_(True)
    recipe = Recipe(
        model=ModelSection(id="-"),
        data=DataSection(train="-"),
        full=FullSection(gradient_release=releases, weights="bf16", **full),
        train=TrainSection(max_grad_norm=None, compile="always" if compiles else "never"),
    )
    ids = np.random.default_rng(0).integers(3, 2048, (8, 16)).astype(np.int32)
    examples = [Encoded("-", row, np.ones(16, dtype=np.bool_)) for row in ids]
    optimizer = make_optimizer(model, recipe, Method.FULL, seed=0)
    release = make_release(model, optimizer, recipe, Method.FULL)
    runner = prepare_engine(model, recipe, num_steps=4, releases=release is not None)
    with deterministic(True), release or nullcontext():
        result = train(
            model,
            examples,
            [[0, 1], [2, 3], [4, 5], [6, 7]],
            optimizer,
            learning_rates=[1e-3] * 4,
            micro_batch_tokens=32,
            packing=True,
            pad_id=0,
            max_grad_norm=None,
            seed=0,
            runner=runner,
            release=release,
        )
    sizes = sum(p.numel() * p.element_size() for p in model.parameters())
    return digest({n: p.detach() for n, p in model.named_parameters()}), result, sizes


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw_bf16", "adamw", "adamw_8bit"])
def test_the_peak_loses_the_gradients_and_the_weights_are_the_same(
    optimizer: str, compiles: bool
) -> None:
    prepare(True)
    kept, there, gradients = _run(releases=False, compiles=compiles, optimizer=optimizer)
    released, here, _ = _run(releases=True, compiles=compiles, optimizer=optimizer)
    assert released == kept
    assert [r.loss for r in here.steps] == [r.loss for r in there.steps]
    norms = [r.grad_norm for r in there.steps]
    assert [r.grad_norm for r in here.steps] == pytest.approx(norms, rel=1e-4)
    # What is left: one layer's (compiled, they come together), the room of an update, activations.
    assert there.peak_memory_bytes - here.peak_memory_bytes > 0.6 * gradients
