"""Fused groups against the layers that they stand in for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoConfig,
    OPTConfig,
    PreTrainedModel,
)

from tests.tiny import CONFIGS, tiny_model
from tunefork.errors import ModelError
from tunefork.kernels import bf16_product, int8_product
from tunefork.kernels.cuda_source import CudaSourceError
from tunefork.kernels.directions import along
from tunefork.kernels.layout import Products, Storage
from tunefork.model.build import build
from tunefork.model.fused import fuse
from tunefork.model.linear import LoraLinear
from tunefork.model.shared_inputs import find_groups
from tunefork.recipe import LoraSection, Method

IDS = torch.arange(3, 67).view(2, 32)


RANK_4 = LoraSection(rank=4)


def _trained(lora: LoraSection = RANK_4, method: Method = Method.LORA) -> PreTrainedModel:
    model = tiny_model("llama").bfloat16()
    build(model, method, lora, seed=0)
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            torch.nn.init.normal_(layer.lora_b, std=0.05)
    return model


def _loss(model: torch.nn.Module) -> torch.Tensor:
    logits = model(input_ids=IDS, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())


def test_layers_with_one_input_are_found_without_their_names() -> None:
    model = _trained()
    found = [[path.rpartition(".")[2] for path in group] for group in find_groups(model)]
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert found == block * 2


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_a_layer_whose_result_is_changed_in_place_is_in_no_group(storage: Storage) -> None:
    """PyTorch forbids that of a part of what a Function returns."""
    method = Method.QLORA if storage == "nf4" else Method.LORA
    config = OlmoConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        clip_qkv=0.1,
    )
    losses = []
    for is_fused in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).bfloat16()
        build(model, method, RANK_4, seed=0)
        if is_fused:
            fuse(model, storage, "bf16" if storage == "nf4" else "int8", torch.device("cpu"))
            found = [len(group) for group in find_groups(model)]
            assert found == [1, 1, 1, 1, 2, 1]
        losses.append(_loss(model.train()))
        losses[-1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)


@pytest.mark.parametrize("storage", ["int8", "nf4"])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "up_proj")])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_loss_and_gradients_point_where_the_plain_layers_do(
    storage: Storage, targets: Any, dropout: float
) -> None:
    method = Method.QLORA if storage == "nf4" else Method.LORA
    lora = LoraSection(rank=4, targets=targets, dropout=dropout)
    plain, fused = _trained(lora, method), _trained(lora, method)
    groups = fuse(fused, storage, "int8", torch.device("cpu"))
    plain.eval()
    fused.eval()
    expected, actual = _loss(plain), _loss(fused)
    assert abs(actual.item() - expected.item()) < 0.02 * expected.item()
    expected.backward()
    actual.backward()
    for group in groups:
        assert group.outputs == () and group.input is None
    got = dict(fused.named_parameters())
    for name, want in plain.named_parameters():
        if want.requires_grad:
            assert want.grad is not None and got[name].grad is not None
            assert F.cosine_similarity(want.grad.flatten(), got[name].grad.flatten(), 0) > 0.98, (
                name
            )


@pytest.mark.parametrize("form", ["bf16", "int8", "fp8"])
def test_a_delta_is_that_of_now(form: Any) -> None:
    model = _trained()
    fuse(model, form, form, torch.device("cpu"))
    before = model(input_ids=IDS).logits
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoraLinear):
                layer.lora_b.zero_()
    without = model(input_ids=IDS).logits
    assert (before - without).abs().max() > 0.05


@pytest.mark.parametrize("ids", [None, IDS])
def test_what_is_multiplied_apart_is_of_the_weights_as_they_came(ids: torch.Tensor | None) -> None:
    """And these are let go of, whether it is made of them or not."""
    paths = find_groups(plain := _trained())
    groups = fuse(_trained(), "int8", "int8", torch.device("cpu"), ids)
    for group, names in zip(groups, paths, strict=True):
        apart_om, probe_md = group.weights[-2:]
        bases: list[Any] = [plain.get_submodule(name).base for name in names]
        assert group.exact == () and bool(probe_md.any()) == (ids is not None)
        assert torch.equal(apart_om, torch.cat([along(base.weight, probe_md) for base in bases]))


def test_deltas_are_current_in_a_model_whose_head_goes_past_its_base_model() -> None:
    """OPT's: a hook on the base model would never run."""
    config = OPTConfig(
        vocab_size=96,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    ids = torch.arange(3, 19)[None]
    logits = []
    for is_fused in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        build(model, Method.LORA, RANK_4, seed=0)
        if is_fused:
            fuse(model, "bf16", "bf16", torch.device("cpu"))
        torch.manual_seed(1)
        for layer in model.modules():
            if isinstance(layer, LoraLinear):
                torch.nn.init.normal_(layer.lora_b, std=0.5)
        logits.append(model(input_ids=ids, use_cache=False).logits)
    torch.testing.assert_close(logits[1], logits[0])


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_fused_bf16_base_changes_nothing(name: str) -> None:
    """In fp32, to rounding; q, k and v of several widths, gate and up widened or one layer."""
    found = []
    for is_fused in (False, True):
        model = tiny_model(name)
        build(model, Method.LORA, RANK_4, seed=0)
        if is_fused:
            fuse(model, "bf16", "bf16", torch.device("cpu"))
        torch.manual_seed(1)
        for layer in model.modules():
            if isinstance(layer, LoraLinear):
                torch.nn.init.normal_(layer.lora_b, std=0.05)
        loss = _loss(model)
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for key, want in found[0].items():
        assert float((found[1][key] - want).norm()) <= 1e-5 * float(want.norm()), key


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_a_head_with_trained_rows_stays_as_it_is(method: Method) -> None:
    model = tiny_model("llama").bfloat16()
    build(model, method, RANK_4, seed=0, new_ids=(90, 91))
    head = model.get_output_embeddings()
    base = head.base
    fuse(model, "nf4" if method is Method.QLORA else "int8", "int8", torch.device("cpu"))
    assert model.get_output_embeddings() is head
    assert head.base is base


def _mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config).bfloat16()


def _bloom() -> PreTrainedModel:
    torch.manual_seed(0)
    return BloomForCausalLM(
        BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
    ).bfloat16()


@pytest.mark.parametrize(
    ("make", "num_layers", "num_groups"),
    [(_mixtral, 8, 4), (_bloom, 4, 4)],
    ids=["experts take bf16 alone, also without values", "a mask of two dimensions alone"],
)
def test_models_that_do_not_run_without_values_as_they_are_can_be_fused(
    make: Callable[[], PreTrainedModel], num_layers: int, num_groups: int
) -> None:
    plain, fused = make().eval(), make().eval()
    for model in (plain, fused):
        build(model, Method.LORA, LoraSection(rank=4, targets="attention"), seed=0)
    groups = fuse(fused, "bf16", "bf16", torch.device("cpu"))
    assert len(groups) == num_groups
    assert sum(len(group.layout.sizes) for group in groups) == num_layers
    assert torch.allclose(fused(IDS).logits, plain(IDS).logits, atol=0.02)


def test_a_pass_that_was_cut_short_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _trained()
    groups = fuse(model, "bf16", "bf16", torch.device("cpu"))

    def full(*_: Any) -> None:
        raise MemoryError

    for layer in model.model.layers:
        monkeypatch.setattr(layer.mlp.act_fn, "forward", full)
    with pytest.raises(MemoryError):  # between gate and up, which waits for its turn
        _loss(model)
    assert any(group.outputs for group in groups)
    monkeypatch.undo()
    held: list[bool] = []
    first = model.model.layers[0]
    first.register_forward_pre_hook(lambda *_: held.append(any(g.outputs for g in groups)))
    _loss(model)
    assert held == [False]


@pytest.mark.parametrize("storage", ["bf16", "int8", "fp8"])
def test_no_tokens_give_no_tokens(storage: Storage) -> None:
    """As an expert has that no token was sent to."""
    products: Any = storage
    [group, *_] = fuse(_trained(), storage, products, torch.device("cpu"))
    found = group(torch.empty(0, group.features_in, dtype=torch.bfloat16))
    assert [tuple(y.shape) for y in found] == [(0, size) for size in group.layout.sizes]


@pytest.mark.parametrize("storage", ["bf16", "int8", "fp8", "nf4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(storage: Storage, value: float) -> None:
    model = tiny_model("llama").bfloat16()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    build(model, Method.QLORA if storage == "nf4" else Method.LORA, RANK_4, seed=0)
    with pytest.raises(ModelError, match=r"model\.id: a weight of .*layers\.1\.mlp\.up_proj"):
        fuse(model, storage, "int8" if storage == "nf4" else storage, torch.device("cpu"))


@pytest.mark.parametrize(
    ("storage", "products"), [("int8", "bf16"), ("fp8", "int8"), ("nf4", "fp8"), ("bf16", "int8")]
)
def test_forms_that_there_are_not_are_refused(storage: Storage, products: Products) -> None:
    model = _trained()
    with pytest.raises(ValueError, match=f"a base kept in {storage}"):
        fuse(model, storage, products, torch.device("cpu"))


@pytest.mark.parametrize(
    ("products", "module", "instead"),
    [
        ("int8", int8_product, "bf16"),
        ("bf16", bf16_product, "fp32"),
        ("int8", bf16_product, "fp32"),  # bf16 would fail on it too
    ],
)
def test_a_kernel_that_cannot_be_had_names_field_and_remedy(
    products: Any, module: Any, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: torch.device) -> None:
        raise CudaSourceError("the product is wrong")

    monkeypatch.setattr(int8_product, "check_kernel", lambda _: None)
    monkeypatch.setattr(module, "check_kernel", refuse)
    message = rf"train\.precision: {products} .* is wrong; set {instead}"
    with pytest.raises(ModelError, match=message):
        fuse(_trained(), products, products, torch.device("cuda"))
