"""Loss only where supervised, alike by both ways through the head, and alike packed or not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig

from tests.model.packed_models import TAKE, made
from tests.tiny import CONFIGS, VOCABULARY, tiny_model
from tunefork.data.bucket import bucket, padded, size_of
from tunefork.data.example import Encoded
from tunefork.data.pack import MicroBatch, pack
from tunefork.model.attention import NAME, register
from tunefork.model.head import Head, find_head
from tunefork.model.layers import prepare_layers
from tunefork.train.loss import loss_sum, token_losses


def examples(lengths: tuple[int, ...] = (9, 4, 17, 6, 12), seed: int = 0) -> list[Encoded]:
    """Random examples whose second half is supervised."""
    rng = np.random.default_rng(seed)
    return [
        Encoded(
            f"row {i}",
            rng.integers(3, VOCABULARY, length, dtype=np.int32),
            np.arange(length) >= length // 2,
        )
        for i, length in enumerate(lengths)
    ]


def _definition(model: torch.nn.Module, encoded: list[Encoded]) -> torch.Tensor:
    """Each example alone, all logits, PyTorch's loss."""
    total = torch.zeros(())
    for example in encoded:
        ids = torch.from_numpy(example.input_ids).long()[None]
        losses = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"
        )
        total = total + losses[torch.from_numpy(example.supervised[1:])].sum()
    return total


@pytest.mark.parametrize("implementation", ["sdpa", NAME])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_equals_each_example_alone(architecture: str, packing: bool, implementation: str) -> None:
    register()
    model = tiny_model(architecture, attn_implementation=implementation)
    encoded = examples()
    head = find_head(model)
    assert head.is_plain
    batches = pack(encoded, max_tokens=64, packing=packing)
    expected = _definition(tiny_model(architecture, attn_implementation="eager"), encoded)
    actual = torch.stack([loss_sum(model, head, batch) for batch in batches]).sum()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    by_token = torch.cat([token_losses(model, head, batch) for batch in batches])
    assert by_token.shape == (sum(int(e.supervised.sum()) for e in encoded),)
    torch.testing.assert_close(by_token.sum(), expected.detach(), rtol=1e-5, atol=1e-4)


def test_a_head_that_scales_takes_the_other_way() -> None:
    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        logit_scale=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    head = find_head(model)
    assert not head.is_plain
    encoded = examples()
    expected = _definition(model, encoded)
    [batch] = pack(encoded, max_tokens=64, packing=True)
    actual = loss_sum(model, head, batch)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    wrong = loss_sum(model, replace(head, is_plain=True), batch)
    assert abs(float((wrong - expected).detach())) > 0.1
    torch.testing.assert_close(token_losses(model, head, batch).sum(), expected.detach())
    assert model.lm_head._forward_pre_hooks == {}


def test_gradients_equal_the_definition() -> None:
    model, encoded = tiny_model("llama"), examples()
    _definition(model, encoded).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for batch in pack(encoded, max_tokens=64, packing=True):
        loss_sum(model, find_head(model), batch).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def _gradients(
    model: torch.nn.Module, head: Head, batches: list[MicroBatch]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = torch.stack([loss_sum(model, head, batch) for batch in batches]).sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.detach(), [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", TAKE)
def test_segments_equal_the_mask(architecture: str, packing: bool, recompute: bool) -> None:
    model, encoded = made(TAKE[architecture]).train(), examples()
    if recompute:
        prepare_layers(model, "full", compiles=False)
    batches = pack(encoded, max_tokens=64, packing=packing, row_length=24)
    head = find_head(model)
    loss, gradients = _gradients(model, head, batches)
    told, by_segments = _gradients(model, replace(head, takes_segments=True), batches)
    torch.testing.assert_close(told, loss, rtol=1e-5, atol=1e-4)
    assert len(gradients) > 10
    for got, want in zip(by_segments, gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, _definition(made(TAKE[architecture]), encoded).detach())


@pytest.mark.parametrize("lengths", [(9, 4, 17, 6, 12), (300, 290), (128, 128, 128)])
def test_filling_adds_nothing(lengths: tuple[int, ...]) -> None:
    model = made(TAKE["mistral"])
    # The fused kernel's place for ignored labels is tested with it; here it is PyTorch's.
    head = replace(find_head(model), is_plain=False, takes_segments=True)
    row_length = None if len(lengths) == 5 else max(lengths)
    [batch] = pack(examples(lengths), max_tokens=1024, packing=True, row_length=row_length)
    size = replace(size_of(batch), supervised=bucket(len(batch.labels)) + 64)
    assert size.is_uniform == (lengths == (128, 128, 128))
    loss, gradients = _gradients(model, head, [batch])
    full, by_full = _gradients(model, head, [padded(batch, size)])
    torch.testing.assert_close(full, loss, rtol=1e-6, atol=1e-4)
    for got, want in zip(by_full, gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_evaluation_keeps_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(TAKE["llama"])
    head = replace(find_head(model), takes_segments=True)
    [batch] = pack(examples(), max_tokens=64, packing=True)

    def called(*_: object, **__: object) -> None:
        raise AssertionError("told segments")

    monkeypatch.setattr("tunefork.model.attention.packed_attention", called)
    for way in (head, replace(head, is_plain=False)):
        assert token_losses(model, way, batch).isfinite().all()
        with pytest.raises(AssertionError, match="told segments"):
            loss_sum(model, way, batch)
