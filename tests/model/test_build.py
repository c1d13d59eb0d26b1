"""Which layers get a delta, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.tiny import CONFIGS, tiny_model
from tunefork.errors import ModelError
from tunefork.model.build import add_deltas, build, find_targets
from tunefork.model.linear import LoraLinear, Nf4Linear
from tunefork.recipe import LoraSection, Method

NAMES = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen3": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gemma3": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
}
IDS = torch.arange(3, 19)[None]


def _names(paths: list[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_all_linear_is_every_linear_layer_but_the_head(architecture: str) -> None:
    model = tiny_model(architecture)
    paths = add_deltas(model, LoraSection(rank=4), seed=0)
    assert _names(paths) == NAMES[architecture]
    assert len(paths) == len(NAMES[architecture]) * 2
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.lora_{x}" for path in paths for x in "ab"}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_blocks_split_the_layers(architecture: str) -> None:
    model = tiny_model(architecture)
    attention, mlp = find_targets(model, "attention"), find_targets(model, "mlp")
    assert sorted(attention + mlp) == sorted(find_targets(model, "all-linear"))
    assert attention and mlp and not set(attention) & set(mlp)


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_an_untrained_delta_changes_nothing(method: Method) -> None:
    model = tiny_model("llama")
    build(model, method, LoraSection(rank=4), seed=0)
    with torch.no_grad():
        before = model(IDS).logits
        for module in model.modules():
            if isinstance(module, LoraLinear):
                assert bool(module.lora_a.any())
                module.lora_a.zero_()
        torch.testing.assert_close(model(IDS).logits, before)


def test_nf4_is_close_and_four_bits() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 128)
    quantized = Nf4Linear(linear)
    assert quantized.codes.numel() * quantized.codes.element_size() == 256 * 128 // 2
    weight = linear.weight.detach()
    error = (quantized.materialize() - weight).norm() / weight.norm()
    # NF4's relative error on a flat distribution is about 0.09; 3 bits would give twice that.
    assert 0.02 < float(error) < 0.12
    x = torch.randn(3, 256)
    torch.testing.assert_close(
        quantized(x), nn.functional.linear(x, quantized.materialize(), linear.bias)
    )


@pytest.mark.parametrize("lora", [{}, {"dropout": 0.1}, {"targets": "attention"}])
def test_qlora_keeps_no_dequantised_weight_for_the_backward_pass(lora: dict[str, Any]) -> None:
    def kept_bytes(method: Method) -> int:
        model = tiny_model("llama").bfloat16().train()
        build(model, method, LoraSection(rank=2, **lora), seed=0)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(IDS, use_cache=False)
        return sum(kept.values())

    assert kept_bytes(Method.QLORA) <= kept_bytes(Method.LORA)


def test_qlora_quantises_layers_that_get_no_delta_too() -> None:
    model = tiny_model("llama")
    build(model, Method.QLORA, LoraSection(rank=2, targets=("q_proj",)), seed=0)
    layer = model.model.layers[0]
    assert isinstance(layer.mlp.up_proj, Nf4Linear)
    assert isinstance(layer.self_attn.q_proj.base, Nf4Linear)
    assert isinstance(model.lm_head, nn.Linear)


def test_full_trains_everything() -> None:
    model = tiny_model("llama").requires_grad_(False)
    build(model, Method.FULL, LoraSection(), seed=0)
    assert all(p.requires_grad for p in model.parameters())


def test_the_same_seed_draws_the_same_adapter() -> None:
    first, second, third = tiny_model(), tiny_model(), tiny_model()
    for model, seed in ((first, 1), (second, 1), (third, 2)):
        add_deltas(model, LoraSection(rank=4), seed=seed)
    a = [m.model.layers[1].mlp.up_proj.lora_a for m in (first, second, third)]
    assert torch.equal(a[0], a[1]) and not torch.equal(a[0], a[2])


def test_scales() -> None:
    for scaling, expected in (("standard", 32 / 16), ("rslora", 32 / 4)):
        model = tiny_model()
        add_deltas(model, LoraSection.model_validate({"scaling": scaling}), seed=0)
        assert model.model.layers[0].mlp.up_proj.scale == expected


def test_a_rank_above_a_layer_names_it() -> None:
    with pytest.raises(ModelError, match=r"lora\.rank: 20 .*k_proj \(32 -> 16\); at most 16"):
        add_deltas(tiny_model(), LoraSection(rank=20), seed=0)


def test_targets_that_match_nothing_name_what_there_is() -> None:
    with pytest.raises(ModelError, match=r"'q_prj' matches no .* did you mean 'q_proj'"):
        find_targets(tiny_model(), ("q_prj",))
    with pytest.raises(ModelError, match="'lm_head' matches no linear layer"):
        find_targets(tiny_model(), ("lm_head",))


def test_conv1d_and_experts_are_refused_by_name() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16))
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        find_targets(gpt2, "all-linear")
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    moe = MixtralForCausalLM(config)
    with pytest.raises(ModelError, match=r"experts.* holds the weights of several experts"):
        build(moe, Method.QLORA, LoraSection(rank=2), seed=0)
    assert _names(add_deltas(moe, LoraSection(rank=2, targets=("q_proj",)), seed=0)) == {"q_proj"}


def test_a_recurrent_layers_filter_is_no_expert() -> None:
    config = Lfm2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    paths = add_deltas(Lfm2ForCausalLM(config), LoraSection(rank=2), seed=0)
    assert any("conv.in_proj" in path for path in paths)
