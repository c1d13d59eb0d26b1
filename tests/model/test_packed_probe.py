"""Which models are told segments: every kind that may be, and none that must not."""

from typing import Any

import pytest
import torch

from tests.model.packed_models import REFUSE, TAKE, made
from tunefork.model.attention import NAME
from tunefork.model.head import find_head
from tunefork.model.packed_probe import takes_segments


@pytest.mark.parametrize("name", TAKE)
def test_models_that_take_segments(name: str) -> None:
    model = made(TAKE[name]).train()
    random = torch.get_rng_state()
    assert takes_segments(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and model.config._attn_implementation == NAME


@pytest.mark.parametrize("why", REFUSE)
def test_models_that_keep_the_mask(why: str) -> None:
    model = made(REFUSE[why])
    assert not takes_segments(model)
    assert not model.training and model.config._attn_implementation == NAME


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_attention_keeps_the_mask(implementation: str) -> None:
    model = made(TAKE["llama"])
    model.config._attn_implementation = implementation
    assert not takes_segments(model)


def _without(monkeypatch: pytest.MonkeyPatch, module: Any, *names: str) -> None:
    """Make `module`, of attention, drop these keyword arguments."""
    forward = module.forward

    def dropping(*inputs: Any, **kwargs: Any) -> Any:
        return forward(*inputs, **{k: v for k, v in kwargs.items() if k not in names})

    monkeypatch.setattr(module, "forward", dropping)


def test_one_layer_that_drops_the_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(TAKE["llama"])
    _without(monkeypatch, model.model.layers[1].self_attn, "cu_seq_lens_q")
    assert not takes_segments(model)


def test_one_layer_that_drops_the_mask_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(TAKE["llama"])
    _without(monkeypatch, model.model.layers[1].self_attn, "attention_mask")
    assert not takes_segments(model)


def test_a_window_that_only_the_mask_knows() -> None:
    """However much longer than the probe's rows it is."""
    model = made(TAKE["qwen2"])

    def windows(of_mask: int, of_attention: int) -> bool:
        model.config.sliding_window = of_mask
        for layer in model.model.layers:
            if layer.self_attn.sliding_window is not None:
                layer.self_attn.sliding_window = of_attention
        return takes_segments(model)

    assert windows(4, 4) and windows(4096, 4096)
    assert not windows(4, 4096)
    assert not windows(2048, 4096)


def test_a_layer_without_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(TAKE["llama"])

    def mix(hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return hidden_states.cumsum(1), None

    monkeypatch.setattr(model.model.layers[0].self_attn, "forward", mix)
    assert not takes_segments(model)


def test_a_model_that_does_something_else_to_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as counting positions from it: only the second pass shows it."""
    model = made(TAKE["llama"])
    forward = model.model.forward

    def counting(*, attention_mask: Any = None, position_ids: Any, **kwargs: Any) -> Any:
        if attention_mask is not None:
            position_ids = position_ids * 7
        return forward(attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", counting)
    assert not takes_segments(model)


def test_a_cpu_keeps_the_mask() -> None:
    assert not find_head(made(TAKE["llama"])).takes_segments
