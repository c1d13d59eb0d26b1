"""The loop: accumulation, packing, determinism, and how it ends."""

import os
import signal

import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny import tiny_model
from tests.train.test_loss import examples
from tunefork.data.example import Encoded
from tunefork.errors import DivergedError
from tunefork.model.build import build
from tunefork.model.layers import prepare_layers
from tunefork.recipe import LoraSection, Method
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.loop import StepRecord, TrainResult, train
from tunefork.train.optim import ShadowAdamW

EXAMPLES = examples((9, 4, 17, 6, 12, 8, 5, 11))
STEPS = [[0, 1, 2, 3], [4, 5, 6, 7], [2, 0, 7, 5]]


def _run(
    method: Method,
    *,
    max_tokens: int = 256,
    packing: bool = True,
    dropout: float = 0.0,
    learning_rate: float = 1e-2,
    checkpointing: bool = False,
    encoded: list[Encoded] = EXAMPLES,
    on_step: object = None,
) -> tuple[PreTrainedModel, TrainResult]:
    model = tiny_model("llama")
    build(model, method, LoraSection(rank=4, dropout=dropout), seed=0)
    if checkpointing:
        prepare_layers(model, "full", compiles=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: LoraAdamW | ShadowAdamW
    if method is Method.FULL:
        optimizer = ShadowAdamW(
            trained, keep_shadows=False, eight_bit=False, betas=(0.9, 0.999), weight_decay=0.0
        )
    else:
        optimizer = LoraAdamW(trained, betas=(0.9, 0.999), weight_decay=0.0)
    records: list[StepRecord] = []
    result = train(
        model,
        encoded,
        STEPS,
        optimizer,
        learning_rates=[learning_rate] * len(STEPS),
        micro_batch_tokens=max_tokens,
        packing=packing,
        pad_id=0,
        max_grad_norm=1.0,
        seed=0,
        on_step=on_step or records.append,  # type: ignore[arg-type]
    )
    return model, result


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", Method)
def test_neither_accumulation_nor_packing_changes_what_is_learnt(method: Method) -> None:
    reference, whole = _run(method, packing=False)
    expected = _weights(reference)
    for max_tokens, packing in ((17, False), (17, True), (40, True)):
        model, result = _run(method, max_tokens=max_tokens, packing=packing)
        # fp32 sums in another order: some 1e-6 of a loss after two updates
        losses = [r.loss for r in whole.steps]
        assert [r.loss for r in result.steps] == pytest.approx(losses, rel=1e-5)
        for name, weight in _weights(model).items():
            # AdamW's first steps are sign-like: a gradient near zero may flip by rounding.
            difference = (weight - expected[name]).norm() / expected[name].norm()
            assert float(difference) < 1e-3, (name, max_tokens, packing)


@pytest.mark.parametrize("method", Method)
def test_it_learns_and_repeats_bit_for_bit(method: Method) -> None:
    first, result = _run(method, dropout=0.1)
    second, again = _run(method, dropout=0.1)
    assert result.steps == again.steps
    for name, weight in _weights(first).items():
        assert torch.equal(weight, _weights(second)[name]), name
    _, longer = _run(method, learning_rate=3e-2)
    assert longer.steps[-1].loss < longer.steps[0].loss
    assert result.status == "ok" and result.tokens == 72 + 17 + 9 + 11 + 8
    assert result.supervised_tokens > 0 and result.peak_memory_bytes > 0


def test_dropout_changes_training() -> None:
    assert _run(Method.LORA, dropout=0.5)[1].steps != _run(Method.LORA)[1].steps


@pytest.mark.parametrize("method", Method)
def test_checkpointing_changes_nothing(method: Method) -> None:
    plain, checkpointed = _weights(_run(method)[0]), _weights(_run(method, checkpointing=True)[0])
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])


def test_divergence_stops_before_the_update_and_names_the_rows() -> None:
    model = tiny_model("llama")
    build(model, Method.LORA, LoraSection(rank=4), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.model.layers[0].mlp.up_proj.base.weight.data[0, 0] = float("nan")
    before = _weights(model)
    with pytest.raises(DivergedError, match=r"step 1: .*nan.* rows: row 0, row 1, row 2, row 3\."):
        train(
            model,
            EXAMPLES,
            STEPS,
            LoraAdamW(trained, betas=(0.9, 0.999), weight_decay=0.0),
            learning_rates=[1e-2] * 3,
            micro_batch_tokens=64,
            packing=True,
            pad_id=0,
            max_grad_norm=1.0,
            seed=0,
        )
    for name, weight in _weights(model).items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(number: signal.Signals) -> None:
    seen: list[int] = []

    def on_step(record: StepRecord) -> None:
        seen.append(record.step)
        if record.step == 1:
            os.kill(os.getpid(), number)

    model, result = _run(Method.LORA, on_step=on_step)
    assert result.status == "interrupted" and len(result.steps) < len(STEPS)
    assert any(bool(w.any()) for n, w in _weights(model).items() if "lora_b" in n)
