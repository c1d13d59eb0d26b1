"""MLPs that take SwiGLU and `down` as one: which do, and that it is the same training."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny import CONFIGS, tiny_model
from tunefork.kernels import gated_lora as function
from tunefork.kernels.gated import gated_down
from tunefork.kernels.int8_gated import int8_gated
from tunefork.kernels.layout import Products, Storage
from tunefork.model import gated
from tunefork.model.build import build
from tunefork.model.fused import FusedLinear, calibrate, fuse
from tunefork.model.gated import Gated, prepare_gated
from tunefork.model.layers import prepare_layers
from tunefork.model.linear import LoraLinear
from tunefork.recipe import Checkpointing, LoraSection, Method

INT8: dict[str, Any] = {"storage": "int8", "products": "int8"}
IDS = torch.arange(3, 67).view(2, 32)


def _model(
    name: str = "llama",
    lora: LoraSection | None = None,
    storage: Storage = "bf16",
    products: Products = "bf16",
    method: Method = Method.LORA,
) -> Any:
    model = tiny_model(name)
    if products == "int8":
        model.bfloat16()
    build(model, method, lora or LoraSection(rank=4), seed=0)
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            torch.nn.init.normal_(layer.lora_b, std=0.05)
    fuse(model, storage, products, torch.device("cpu"))
    return model.train()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take MLPs as a GPU would."""
    monkeypatch.setattr(gated, "has_kernels", lambda *_: True)


def _step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=IDS, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_those_that_multiply_by_silu_of_a_layer_do(name: str) -> None:
    """Gemma's is gelu, Phi's gate and up are one layer, GPT-NeoX has no gate."""
    model = _model(name)
    keys = list(model.state_dict())
    found = prepare_gated(model)
    assert len(found) == (2 if name in ("llama", "qwen3") else 0)
    assert all(isinstance(mlp, Gated) for mlp in found) and prepare_gated(model) == found
    assert len({type(mlp) for mlp in found}) <= 1
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("more", "takes"),
    [
        ({}, True),
        ({"lora": LoraSection(rank=4, targets=("down_proj",))}, True),
        ({"storage": "nf4", "method": Method.QLORA}, True),
        ({"lora": LoraSection(rank=4, targets=("gate_proj", "up_proj"))}, False),
        ({"lora": LoraSection(rank=4, dropout=0.1)}, False),
        ({"lora": LoraSection(rank=4, targets="attention", modules_to_save=("down_proj",))}, False),
        ({"lora": LoraSection(rank=4, targets="attention", modules_to_save=("up_proj",))}, False),
        ({"storage": "fp8", "products": "fp8"}, False),
        ({"storage": "nf4", "products": "int8", "method": Method.QLORA}, True),
        ({"storage": "int8", "products": "int8"}, True),
        ({**INT8, "lora": LoraSection(rank=4, targets=("down_proj",))}, False),
        ({**INT8, "lora": LoraSection(rank=4, targets=("gate_proj", "down_proj"))}, False),
        ({**INT8, "lora": LoraSection(rank=4, targets=("gate_proj", "up_proj"))}, False),
        ({**INT8, "lora": LoraSection(rank=4, dropout=0.1)}, False),
    ],
)
def test_what_down_has_to_be(more: Any, takes: bool) -> None:
    assert len(prepare_gated(_model(**more))) == (2 if takes else 0)


class _Mlp(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module


class _Swapped(_Mlp):
    def forward(self, x: Tensor) -> Any:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class _Limited(_Mlp):
    def forward(self, x: Tensor) -> Any:
        gate, up = self.gate_proj(x).clamp(max=20.0), self.up_proj(x)
        return self.down_proj(self.act_fn(gate) * up)


class _Dropping(_Mlp):
    def forward(self, x: Tensor) -> Any:
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(F.dropout(h, 0.1, self.training))


class _Scaled(_Mlp):
    def forward(self, x: Tensor) -> Any:
        return self.down_proj(1.01 * self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _OfItsSize(_Mlp):
    def forward(self, x: Tensor) -> Any:
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(h.view(*x.shape[:-1], 48))


class _Pair(_Mlp):
    def forward(self, x: Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), None


class _Asserting(_Mlp):
    def forward(self, x: Tensor) -> Any:
        assert x.shape[-1] == 32
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(
    "kind", [_Swapped, _Limited, _Dropping, _Scaled, _OfItsSize, _Pair, _Asserting]
)
def test_a_module_that_computes_something_else_does_not(kind: type[nn.Module]) -> None:
    model = _model().eval()  # as a model may be when it is prepared
    changed = model.model.layers[1].mlp
    changed.__class__ = kind
    assert prepare_gated(model) == [model.model.layers[0].mlp]
    assert type(changed) is kind


def test_nor_one_with_something_of_its_own_or_a_hook() -> None:
    model = _model()
    first, second = (layer.mlp for layer in model.model.layers)
    first.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.1)).eval()
    second.down_proj.register_forward_hook(lambda *_: None)
    assert prepare_gated(model) == []
    first.act_fn = nn.PReLU(init=1.0)
    assert prepare_gated(model) == []


def test_looking_for_them_draws_no_random_numbers_and_changes_nothing() -> None:
    model = _model()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    prepare_gated(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_the_step_is_that_of_swiglu_and_a_group(
    name: str, storage: Storage, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def noting(gate: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tuple(gate.shape))
        return gated_down(gate, *rest)

    monkeypatch.setattr(function, "gated_down", noting)
    method = Method.QLORA if storage == "nf4" else Method.LORA
    plain, ours = (_model(name, storage=storage, method=method) for _ in range(2))
    prepare_gated(ours)
    (loss, want), (again, found) = _step(plain), _step(ours)
    assert seen == [(64, 48)] * 2
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    assert found.keys() == want.keys()
    for key, gradient in want.items():
        assert (found[key] - gradient).norm() <= 1e-5 * gradient.norm(), key


def test_biases_are_added(on_gpu: None) -> None:
    plain, ours = (_model() for _ in range(2))
    for model in (plain, ours):
        for layer in model.model.layers:
            for name in ("gate_proj", "down_proj"):
                base = getattr(layer.mlp, name).base
                torch.manual_seed(3)
                base.bias = nn.Parameter(torch.randn(base.out_features), requires_grad=False)
    prepare_gated(ours)
    torch.testing.assert_close(_step(ours)[0], _step(plain)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_the_step_in_int8_is_that_of_the_groups(
    name: str, storage: Storage, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def noting(x: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return int8_gated(x, *rest)

    monkeypatch.setattr(gated, "int8_gated", noting)
    method = Method.QLORA if storage == "nf4" else Method.LORA
    plain, ours = (_model(name, None, storage, "int8", method) for _ in range(2))
    prepare_gated(ours)
    (loss, want), (again, found) = _step(plain), _step(ours)
    assert seen == [(2, 32, 32)] * 2
    # Without the MLP's form silu is rounded too; with it dx of the MLP has codes of another scale.
    torch.testing.assert_close(again, loss, rtol=1e-3, atol=0)
    assert found.keys() == want.keys()
    for key, gradient in want.items():
        cosine = F.cosine_similarity(found[key].flatten(), gradient.flatten(), 0)
        assert cosine > 0.99, key


def test_in_int8_a_bias_of_gate_or_up_takes_what_is_written(on_gpu: None) -> None:
    """That of the last layer is added to the result."""

    def biased(name: str) -> tuple[Any, nn.Parameter]:
        mlp = _model(**INT8).model.layers[0].mlp
        base = getattr(mlp, name).base
        bias = torch.randn(base.out_features, dtype=torch.bfloat16)
        base.bias = nn.Parameter(bias, requires_grad=False)
        return mlp, base.bias

    assert prepare_gated(biased("gate_proj")[0]) == prepare_gated(biased("up_proj")[0]) == []
    (mlp, bias), x = biased("down_proj"), torch.randn(2, 5, 32).bfloat16()
    assert prepare_gated(mlp) == [mlp]
    with_bias = mlp(x)
    mlp.down_proj.base.bias = None
    assert torch.equal(with_bias, mlp(x) + bias)


@pytest.mark.parametrize("more", [{}, INT8], ids=["bf16", "int8"])
def test_a_hook_that_down_is_given_later_is_called(on_gpu: None, more: Any) -> None:
    model, called = _model(**more), list[nn.Module]()
    down: Any = prepare_gated(model)[0].down_proj
    down.register_forward_hook(lambda m, *_: called.append(m))
    _step(model)
    assert called == [down]


def test_in_int8_layers_with_hooks_or_that_were_replaced_are_called(
    on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[nn.Module] = []
    hooked = _model(**INT8)
    hooked.model.layers[0].mlp.gate_proj.register_forward_hook(lambda m, *_: called.append(m))
    assert prepare_gated(hooked) == [hooked.model.layers[1].mlp]
    _step(hooked)
    assert called == [hooked.model.layers[0].mlp.gate_proj]
    later = _model(**INT8)
    mlp: Any = prepare_gated(later)[0]
    mlp.up_proj.register_forward_hook(lambda m, *_: called.append(m))
    _step(later)
    assert called[1:] == [mlp.up_proj]


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_directions_are_set_as_in_a_model_that_is_not_prepared(
    storage: Storage, on_gpu: None
) -> None:
    method = Method.QLORA if storage == "nf4" else Method.LORA
    models = [_model("llama", None, storage, "int8", method) for _ in range(2)]
    prepare_gated(models[1])
    probes = []
    for model in models:
        groups = {m.group: None for m in model.modules() if isinstance(m, FusedLinear)}
        calibrate(model, list(groups), IDS)
        assert model.training and all(group.is_calibrated for group in groups)
        probes.append([group.weights[-1] for group in groups])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*probes, strict=True))
    assert all(probe.any() for probe in probes[0])


@pytest.mark.parametrize("more", [{}, INT8])
def test_evaluation_and_a_cpu_take_what_is_written(
    more: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_asked(*_: Any) -> Any:
        raise AssertionError("this way was not to be taken")

    monkeypatch.setattr(gated, "gated_lora", not_asked)
    monkeypatch.setattr(gated, "int8_gated", not_asked)
    plain, ours = (_model(**more) for _ in range(2))
    prepare_gated(ours)
    assert torch.equal(_step(ours)[0], _step(plain)[0])
    monkeypatch.setattr(gated, "has_kernels", lambda *_: True)
    assert torch.equal(ours.eval()(IDS).logits, plain.eval()(IDS).logits)
    with pytest.raises(AssertionError, match="not to be taken"):
        ours.train()(IDS)


@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
@pytest.mark.parametrize("checkpointing", ["none", "full", "offload", "selective"])
@pytest.mark.parametrize(
    ("more", "compiles"),
    [
        ({}, False),
        (INT8, False),
        pytest.param({}, True, marks=pytest.mark.slow),
        # `test_int8_gated.py` compiles the function alone.
        pytest.param(INT8, True, marks=pytest.mark.slow),
    ],
    ids=["bf16", "int8", "bf16-compiled", "int8-compiled"],
)
def test_however_layers_are_run(
    checkpointing: Checkpointing, compiles: bool, more: Any, on_gpu: None
) -> None:
    plain, ours = (_model(**more) for _ in range(2))
    if more:
        prepare_gated(plain)
    loss, want = _step(plain)
    torch._dynamo.reset()
    forms = []

    def backend(graph: Any, example: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager_decomp_partition

        forms.append(graph)
        return aot_eager_decomp_partition(graph, example)

    compiler = partial(torch.compile, backend=backend, fullgraph=True)
    prepare_layers(ours, checkpointing, compiles=compiles, dynamic=False, compiler=compiler)
    again, found = _step(ours)
    runs = 1 if checkpointing in ("none", "selective") else 2
    assert len(forms) == (runs if compiles else 0)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    for key, gradient in want.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm(), key
    torch._dynamo.reset()
