"""Sick steps: bad weights, bad rows and loss spikes are told apart from ordinary training."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from tests.train.test_loss import examples
from tunefork.errors import ModelError
from tunefork.model.build import build
from tunefork.recipe import LoraSection, Method
from tunefork.train.guard import SpikeWatch, blame, check_weights, lost_gradient

POISON = 95
"""A token id that no other row has."""


def _rows() -> list[Any]:
    rows = [replace(e, input_ids=np.minimum(e.input_ids, 90)) for e in examples((9, 4, 17, 6))]
    rows[2].input_ids[3] = POISON
    return rows


def _model() -> Any:
    model = tiny_model("llama")
    build(model, Method.LORA, LoraSection(rank=4), seed=0)
    return model.train()


def test_the_row_that_is_not_finite_is_named() -> None:
    model = _model()
    # as the wte of a token that overflowed; tied, so it is also one logit of every row
    model.get_input_embeddings().register_forward_hook(
        lambda module, given, out: out.masked_fill((given[0] == POISON)[..., None], float("inf"))
    )
    said = blame(model, _rows(), pad_id=0).said
    assert said == "rows whose own loss is not finite: row 2"
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_that_is_not_finite_is_found_by_its_row() -> None:
    model = _model()

    def spoil(_: object, given: tuple[torch.Tensor], out: torch.Tensor) -> None:
        if out.requires_grad and bool((given[0] == POISON).any()):
            out.register_hook(lambda gradient: gradient * float("nan"))

    model.get_input_embeddings().register_forward_hook(spoil)
    model.get_input_embeddings().weight.requires_grad_(True)
    said = blame(model, _rows(), pad_id=0).said
    assert said == "rows whose own gradient is not finite: row 2"
    assert all(p.grad is None for p in model.parameters())


def test_bad_weights_are_not_blamed_on_the_rows() -> None:
    model = _model()
    model.model.layers[0].mlp.up_proj.base.weight.data[0, 0] = float("nan")
    said = blame(model, _rows(), pad_id=0).said
    assert said.startswith("every row of the step has a loss that is not finite, so the weights")
    with pytest.raises(ModelError, match=r"up_proj\.base\.weight has 1 of \d+ values that are not"):
        check_weights(model, "tiny")


def test_good_weights_pass() -> None:
    check_weights(_model(), "tiny")


def _alarms(losses: Any) -> int:
    watch = SpikeWatch()
    return sum(watch.found(float(loss)) is not None for loss in losses)


@pytest.mark.parametrize("noise", ["normal", "laplace"])
def test_noise_is_no_spike(noise: str) -> None:
    rng = np.random.default_rng(0)
    falling = 1.0 + 2.0 * np.exp(-np.arange(10_000) / 500)
    assert _alarms(falling + 0.1 * getattr(rng, noise)(size=10_000)) <= 1


def test_a_doubled_loss_is_a_spike_and_a_low_one_is_not() -> None:
    losses = 2.0 + 0.1 * np.random.default_rng(0).normal(size=100)
    losses[50] = 4.5
    losses[60] = 0.5
    watch = SpikeWatch()
    flagged = [at for at, loss in enumerate(losses) if watch.found(float(loss)) is not None]
    assert flagged == [50]


def test_a_constant_loss_has_no_spike_in_its_last_digits() -> None:
    assert _alarms([2.0] * 40 + [2.001] + [2.0] * 10) == 0
    assert _alarms([2.0] * 40 + [4.0]) == 1


def test_the_start_of_training_is_not_judged() -> None:
    assert _alarms([2.0] * 10 + [9.0]) == 0


def test_a_step_of_one_row_does_not_convict_the_weights() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    assert blame(model, _rows(), pad_id=0).is_weights
    assert not blame(model, _rows()[:1], pad_id=0).is_weights


@pytest.mark.parametrize(
    ("loss", "norm"), [(2.0, 1e-30), (0.0, 0.0), (1e-6, 0.0), (float("nan"), 0.0)]
)
def test_a_gradient_is_lost_only_where_a_loss_leaves_none_at_all(loss: float, norm: float) -> None:
    """Rows that are known by heart, or a step without a supervised token, have none to leave."""
    assert lost_gradient(loss, norm) is None
    assert "nothing is learnt" in str(lost_gradient(2.0, 0.0))
