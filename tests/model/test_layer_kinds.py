"""Layers that checkpointing cannot take: refused. And dropout is drawn alike by a second run."""

from collections import UserDict
from functools import partial
from typing import Any, cast

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.tiny import tiny_model
from tunefork.errors import ModelError
from tunefork.model.layers import draws, prepare_layers
from tunefork.recipe import Recipe
from tunefork.train import engine

IDS = torch.arange(3, 67).view(2, 32)


def _bigcode(attention_dropout: float) -> PreTrainedModel:
    config = GPTBigCodeConfig(
        vocab_size=96,
        n_embd=32,
        n_layer=2,
        n_head=4,
        attn_pdrop=attention_dropout,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    )
    torch.manual_seed(0)
    return GPTBigCodeForCausalLM(config).train()


def _gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", ["full", "offload"])
def test_dropout_that_is_no_module_is_drawn_alike_again(checkpointing: Any) -> None:
    kept, redone = _bigcode(0.2), _bigcode(0.2)
    assert draws(redone)
    prepare_layers(redone, checkpointing, compiles=False)
    expected, actual = _gradients(kept), _gradients(redone)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=name)


def test_dropout_at_rate_zero_draws_nothing() -> None:
    model = _bigcode(0.0)
    assert not draws(model)
    model.jitter_noise = 0.1  # of Mixtral's router
    assert draws(model)


def test_offload_refuses_layers_of_several_results() -> None:
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4))
    prepare_layers(model.train(), "offload", compiles=False)
    with pytest.raises(ModelError, match="activation_checkpointing: offload.*tuple.*set full"):
        model(input_ids=IDS, use_cache=False)


class _Second(LlamaDecoderLayer):  # type: ignore[misc]
    """Adds a second tensor, as architectures do that hand on the embeddings."""

    def forward(self, x: Any, second: Any = None, **kwargs: Any) -> Any:
        return super().forward(x, **kwargs) + (0.0 if second is None else second)


def test_offload_refuses_a_second_tensor_that_needs_a_gradient() -> None:
    model = tiny_model("llama").train()
    layer = model.model.layers[1]
    layer.__class__ = _Second
    prepare_layers(model, "offload", compiles=False)
    own = layer.forward
    second = torch.randn(2, 32, 32, requires_grad=True)
    layer.forward = lambda *args, **kwargs: own(*args, second=second, **kwargs)
    with pytest.raises(ModelError, match="activation_checkpointing: offload.*set full"):
        model(input_ids=IDS, use_cache=False)


class _HandsOn(LlamaDecoderLayer):  # type: ignore[misc]
    """The first leaves a tensor for the others, as Gemma 4's do keys and values."""

    def forward(self, x: Any, shared: Any = None, **kwargs: Any) -> torch.Tensor:
        if self.self_attn.layer_idx == 0:
            shared["states"] = self.mlp.gate_proj(x)[..., :32]
        else:
            x = x + shared["states"]
        y: torch.Tensor = super().forward(x, **kwargs)
        return y


def _handing_on(checkpointing: Any) -> PreTrainedModel:
    model = tiny_model("llama").train()
    for layer in model.model.layers:
        layer.__class__ = _HandsOn
    prepare_layers(
        model, checkpointing, compiles=checkpointing == "full", compiler=lambda run, **_: run
    )
    shared = UserDict[str, torch.Tensor]()  # as transformers' KVSharingDict is
    model.model.register_forward_pre_hook(lambda *_: shared.clear())
    for layer in model.model.layers:
        layer.forward = partial(layer.forward, shared=shared)
    return cast(PreTrainedModel, model)


def test_gradients_through_what_layers_hand_on_are_not_lost() -> None:
    """A first run keeps no graph of it: `full` is PyTorch's own there, offload is refused."""
    expected, actual = (_gradients(_handing_on(kind)) for kind in ("none", "full"))
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=name)
    with pytest.raises(ModelError, match="activation_checkpointing: offload.*hand.*set full"):
        _gradients(_handing_on("offload"))


def test_checkpointing_is_refused_where_there_are_no_layers_for_it() -> None:
    recipe = Recipe.model_validate(
        {
            "model": "x",
            "data": {"train": "t.jsonl", "eval": "e.jsonl"},
            "train": {"activation_checkpointing": "full"},
        }
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=0))
    with pytest.raises(ModelError, match="activation_checkpointing: full"):
        engine.prepare(model, recipe, num_steps=1)
