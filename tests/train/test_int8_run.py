"""A run over an int8 base on a CPU: it learns, resumes bit for bit, and its adapter fits."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.tiny import tiny_model
from tests.train.test_loss import examples
from tunefork.model.build import build
from tunefork.model.fused import fuse
from tunefork.recipe import LoraSection, Method
from tunefork.registry.peft_save import save_adapter
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.checkpoints import Checkpoints, Policy
from tunefork.train.engine import form_of
from tunefork.train.loop import StepRecord, train

LORA = LoraSection(rank=4)
NUM_STEPS = 8


def _run(
    method: Method, folder: Path | None = None, stop_after: int | None = None
) -> tuple[Any, list[float]]:
    model = tiny_model("llama").bfloat16()
    build(model, method, LORA, seed=0)
    form = form_of(method, kind="cpu", dtype=torch.bfloat16, wants_int8=True, is_dora=False)
    assert form is not None
    fuse(model, form.storage, form.products, torch.device("cpu"))
    losses: list[float] = []

    def record(step: StepRecord) -> None:
        losses.append(step.loss)

    kept = None
    if folder is not None:
        kept = Checkpoints(folder, {}, {}, Policy(every_steps=4), say=lambda line: None)
    train(
        model,
        examples(),
        [[0, 1, 2, 3, 4]] * NUM_STEPS,
        LoraAdamW(
            [p for p in model.parameters() if p.requires_grad],
            betas=(0.9, 0.999),
            weight_decay=0.0,
        ),
        learning_rates=[2e-2] * NUM_STEPS,
        micro_batch_tokens=64,
        packing=True,
        pad_id=0,
        max_grad_norm=1.0,
        seed=0,
        on_step=record,
        checkpoints=kept,
        start=None if kept is None else kept.newest(),
        stop_after=stop_after,
    )
    return model.eval(), losses


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_it_learns_and_goes_on_bit_for_bit(method: Method, tmp_path: Path) -> None:
    model, losses = _run(method)
    assert losses[-1] < 0.97 * losses[0]
    _run(method, tmp_path / "run", stop_after=4)
    resumed, rest = _run(method, tmp_path / "run")
    assert rest == losses[4:]
    pairs = zip(model.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_its_adapter_fits_the_plain_model(tmp_path: Path) -> None:
    model, _ = _run(Method.LORA)
    save_adapter(model, tmp_path / "adapter", LORA, base="tiny")
    plain = tiny_model("llama").bfloat16()
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        actual = model(input_ids=ids).logits.float()
        untrained = plain(input_ids=ids).logits.float()
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        expected = loaded(input_ids=ids).logits.float()
    error = (actual - expected).norm()
    assert error < 0.15 * expected.norm()
    assert error < 0.5 * (expected - untrained).norm()
