"""A bank's slots against the same adapters alone, over every form of the base."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.tiny import tiny_model
from tunefork.errors import AdapterError, ModelError
from tunefork.kernels.bank_stretches import Stretch, lay_out
from tunefork.model.add_bank import add_bank, add_serving_bank
from tunefork.model.bank import Bank, BankAdapter
from tunefork.model.bank_linear import BankLinear
from tunefork.model.build import build, lora_scale, quantize_nf4
from tunefork.model.fused import fuse
from tunefork.model.layers import prepare_layers
from tunefork.model.linear import LoraLinear
from tunefork.model.own_rows import keep_rows
from tunefork.recipe import LoraSection, Method
from tunefork.registry.peft_save import save_adapter, save_deltas

LORAS = (
    LoraSection(rank=4),
    LoraSection(rank=1, targets="attention", alpha=8.0),
    LoraSection(rank=16, targets=("q_proj", "up_proj"), scaling="rslora"),
    LoraSection(rank=2, targets="mlp"),
)
IDS = torch.arange(3, 67).view(4, 16)
ROWS = (1, 0, 2, 1)
"""Rows of `IDS` that are each adapter's."""


def _alone(lora: LoraSection, seed: int, *, nf4: bool, dtype: torch.dtype) -> PreTrainedModel:
    model = tiny_model("llama").to(dtype)
    build(model, Method.QLORA if nf4 else Method.LORA, lora, seed=seed)
    return model


def _bank(*, nf4: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Bank:
    model = tiny_model("llama").to(dtype)
    if nf4:
        quantize_nf4(model)
    return add_bank(model, [BankAdapter(x, seed=i) for i, x in enumerate(LORAS)], **options)


def _draw_b(adapter: dict[str, tuple[Tensor, Tensor]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, b in adapter.values():
        b.copy_(0.05 * torch.randn(b.shape, generator=generator))


def test_a_slot_starts_as_the_same_adapter_alone() -> None:
    bank = _bank()
    for slot, lora in enumerate(LORAS):
        alone = _alone(lora, slot, nf4=False, dtype=torch.float32)
        layers = {p: m for p, m in alone.named_modules() if isinstance(m, LoraLinear)}
        assert list(layers) == list(bank.adapter(slot))
        for path, (a, b) in bank.adapter(slot).items():
            assert torch.equal(a, layers[path].lora_a) and torch.equal(b, layers[path].lora_b)
        assert bank.routing.scales[slot] == lora_scale(lora)


FORMS = {
    "fp32": (False, torch.float32, None),
    "bf16": (False, torch.bfloat16, None),
    "nf4": (True, torch.float32, None),
    "fused_bf16": (False, torch.bfloat16, ("bf16", "bf16")),
    "fused_int8": (False, torch.bfloat16, ("int8", "int8")),
    "fused_nf4": (True, torch.bfloat16, ("nf4", "bf16")),
    "fused_nf4_int8": (True, torch.bfloat16, ("nf4", "int8")),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_row_is_its_adapters_own_model(form: str) -> None:
    """Logits and gradients of a mixed pass are those of each adapter alone over the same base."""
    nf4, dtype, fused = FORMS[form]
    bank = _bank(nf4=nf4, dtype=dtype)
    for slot in range(len(LORAS)):
        _draw_b(bank.adapter(slot), slot)
    if fused is not None:
        fuse(bank.model, *fused, torch.device("cpu"))  # type: ignore[arg-type]
    ends = [16 * sum(ROWS[: i + 1]) for i in range(len(ROWS))]
    bank.route_segments(tuple(zip([0, *ends[:-1]], ends, strict=True)))
    mixed = bank.model(input_ids=IDS).logits
    direction = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    mixed.backward(direction)
    at = 0
    for slot, rows in enumerate(ROWS):
        own = slice(at, at + rows)
        at += rows
        alone = _alone(LORAS[slot], slot, nf4=nf4, dtype=dtype)
        layers = {p: m for p, m in alone.named_modules() if isinstance(m, LoraLinear)}
        with torch.no_grad():
            for path, (_, b) in bank.adapter(slot).items():
                layers[path].lora_b.copy_(b)
        if fused is not None:
            fuse(alone, *fused, torch.device("cpu"))  # type: ignore[arg-type]
        if rows == 0:
            for path in layers:
                assert not any(bool(g.any()) for g in _gradients(bank, slot, path))
            continue
        expected = alone(input_ids=IDS[own]).logits
        expected.backward(direction[own])
        limit = 1e-6 if dtype == torch.float32 else 0.02
        assert (mixed[own] - expected).norm() / expected.norm() < limit
        for path, layer in layers.items():
            for actual, wanted in zip(
                _gradients(bank, slot, path), (layer.lora_a.grad, layer.lora_b.grad), strict=True
            ):
                assert wanted is not None
                assert (actual - wanted).norm() / wanted.norm() < max(limit * 4, 1e-5), path


def _gradients(bank: Bank, slot: int, path: str) -> tuple[Tensor, Tensor]:
    layer = bank.layers[path]
    start = sum(layer.ranks[:slot])
    own = slice(start, start + layer.ranks[slot])
    assert layer.rows_a.grad is not None and layer.rows_b.grad is not None
    return layer.rows_a.grad[own], layer.rows_b.grad[own].t()


@pytest.mark.parametrize("fused", [False, True])
def test_one_slot_is_the_whole_models(fused: bool) -> None:
    bank = _bank(dtype=torch.bfloat16)
    _draw_b(bank.adapter(2), 0)
    if fused:
        fuse(bank.model, "bf16", "bf16", torch.device("cpu"))
    alone = _alone(LORAS[2], 2, nf4=False, dtype=torch.bfloat16)
    for path, (_, b) in bank.adapter(2).items():
        alone.get_submodule(path).lora_b.data.copy_(b)
    base = bank.model(input_ids=IDS).logits
    with bank.only(2):
        found = bank.model(input_ids=IDS).logits
    expected = alone(input_ids=IDS).logits
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert (found - base).norm() > 0.1 * base.norm()
    assert torch.equal(bank.model(input_ids=IDS).logits, base)


def _about_equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() < 0.01 * expected.norm())


@pytest.mark.parametrize(
    "form", ["plain", "bf16", "bf16 joined", "fp8 joined", "plain rows", "bf16 rows"]
)
def test_a_server_tells_each_token_its_adapter(form: str) -> None:
    """Layers by themselves, and groups of them: deltas by layer, A with the group's product, or
    sums of rows."""
    model = tiny_model("llama").bfloat16()
    bank = add_serving_bank(model, slots=3, rank=16)
    train = _bank(dtype=torch.bfloat16)
    for slot in (0, 1, 2):
        _draw_b(train.adapter(slot), slot)
    kind, _, joined = form.partition(" ")
    if kind != "plain":
        for group in fuse(model, kind, kind, torch.device("cpu")):  # type: ignore[arg-type]
            if joined == "rows":
                group.keep_rows()
            elif joined:
                group.join_banks()
    elif joined:
        for layer in bank.layers.values():
            keep_rows([layer])

    def tell(whose: list[int]) -> None:
        index = torch.tensor(whose, dtype=torch.int32).repeat_interleave(16)
        if joined != "rows":
            bank.route_tokens(index)
            return
        rows = [Stretch(slot, 16 * at, 16 * at + 16) for at, slot in enumerate(whose) if slot >= 0]
        bank.route_stretches(lay_out(rows, [16] * len(rows)))

    base = model(input_ids=IDS).logits
    # Another product, other roundings.
    same = torch.equal if joined in ("", "rows") else _about_equal

    def load(slot: int, source: int) -> None:
        scale = train.routing.scales[source]
        found = {p: (a, b, scale) for p, (a, b) in train.adapter(source).items()}
        bank.load(slot, found)

    load(0, 1)
    load(2, 2)
    tell([2, -1, 0, 2])
    mixed = model(input_ids=IDS).logits
    for row, source in enumerate((2, None, 1, 2)):
        if source is None:
            expected = base[row]
        else:
            with train.only(source):
                expected = train.model(input_ids=IDS[row : row + 1]).logits[0]
        most = 0.02 if kind != "fp8" else 0.1
        assert (mixed[row] - expected).norm() < most * expected.norm(), row
    load(0, 0)  # replaced: row 2 changes, and no bit of the others
    tell([0, -1, 0, 2])
    again = model(input_ids=IDS).logits
    assert torch.equal(again[[1, 3]], mixed[[1, 3]])
    assert not torch.equal(again[2], mixed[2])
    bank.clear(0)
    cleared = model(input_ids=IDS).logits
    assert same(cleared[[0, 2]], base[[0, 2]])
    bank.route_none()
    assert torch.equal(model(input_ids=IDS).logits, base)


def test_what_has_no_room_is_refused_and_changes_nothing() -> None:
    model = tiny_model("llama")
    bank = add_serving_bank(model, slots=2, rank=4)
    [(path, layer)] = list(bank.layers.items())[:1]
    a, b = torch.ones(4, layer.in_features), torch.ones(layer.out_features, 4)
    bank.load(1, {path: (a, b, 1.0)})
    for found, why in (
        (
            {path: (torch.ones(8, layer.in_features), torch.ones(layer.out_features, 8), 1.0)},
            "rank",
        ),
        ({path: (a, b[:-1], 1.0)}, "fit"),
        ({"nowhere": (a, b, 1.0)}, "nowhere"),
    ):
        with pytest.raises(AdapterError, match=why):
            bank.load(1, found)
        assert torch.equal(bank.adapter(1)[path][0], a)


@pytest.mark.parametrize(
    ("lora", "field"),
    [
        (LoraSection(dora=True), "lora.dora"),
        (LoraSection(modules_to_save=("norm",)), "lora.modules_to_save"),
        (LoraSection(rank=64), "lora.rank"),
        (LoraSection(targets=("nothing",)), "lora.targets"),
    ],
)
def test_what_a_bank_cannot_hold_is_refused(lora: LoraSection, field: str) -> None:
    with pytest.raises(ModelError, match=field):
        add_bank(tiny_model("llama"), [BankAdapter(lora, seed=0)])


def test_a_slot_is_reused_or_resized() -> None:
    bank = _bank(announced=[LoraSection(rank=32, targets=("down_proj",))])
    before = {p: (a.clone(), b.clone()) for p, (a, b) in bank.adapter(2).items()}
    assert bank.fits(0, LoraSection(rank=2)) and not bank.fits(1, LoraSection(rank=2))
    bank.start(0, BankAdapter(LoraSection(rank=2, targets="mlp"), seed=9))
    alone = _alone(LoraSection(rank=2, targets="mlp"), 9, nf4=False, dtype=torch.float32)
    for path, (a, _) in bank.adapter(0).items():
        assert torch.equal(a, alone.get_submodule(path).lora_a)
        assert not bank.layers[path].own(0)[0][2:].any()
    for path, (a, b) in bank.adapter(2).items():
        assert torch.equal(a, before[path][0]) and torch.equal(b, before[path][1])
    bank.resize([LoraSection(rank=32, targets=("down_proj",)), None])
    bank.start(0, BankAdapter(LoraSection(rank=32, targets=("down_proj",)), seed=1))
    assert [m.ranks for m in bank.layers.values()].count((32, 0)) == 2
    assert isinstance(bank.model.get_submodule("lm_head"), nn.Linear)
    assert not any(isinstance(m, BankLinear) for m in bank.skeleton.modules())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
@pytest.mark.parametrize("fused", [("bf16", "bf16"), ("int8", "int8")])
def test_compiled_layers_serve_every_division_of_their_tokens(fused: Any) -> None:
    """Dynamo and AOTAutograd as on a GPU, without a GPU's code: nothing is compiled for ends."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for is_compiled in (False, True):
        bank = _bank(nf4=fused[0] == "nf4", dtype=torch.bfloat16)
        for slot in range(len(LORAS)):
            _draw_b(bank.adapter(slot), slot)
        storage, products = fused
        fuse(bank.model, storage, products, torch.device("cpu"))
        bank.model.train()
        if is_compiled:
            compiler = partial(torch.compile, backend="aot_eager", fullgraph=True)
            prepare_layers(bank.model, "none", compiles=True, compiler=compiler)
            # Or bf16 copies of all layers' A and B are kept for the backward pass.
            assert not torch._functorch.config.cse
        for rows in ((1, 0, 2, 1), (1, 1, 1, 1), (0, 3, 1, 0)):
            ends = [16 * sum(rows[: i + 1]) for i in range(len(rows))]
            bank.route_segments(tuple(zip([0, *ends[:-1]], ends, strict=True)))
            bank.model.zero_grad()
            y = bank.model(input_ids=IDS, use_cache=False).logits
            y.float().square().mean().backward()
            layers = bank.layers.values()
            grads = [p.grad.clone() for la in layers for p in (la.rows_a, la.rows_b)]  # type: ignore[union-attr]
            found.append([y.detach(), *grads])
    for plain, compiled in zip(found[:3], found[3:], strict=True):
        for actual, expected in zip(compiled, plain, strict=True):
            assert (actual - expected).norm() <= 1e-3 * expected.norm()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2  # even segments have a form of their own


def test_the_files_of_a_slot_are_those_of_the_adapter_alone(tmp_path: Path) -> None:
    bank = _bank()
    for slot, lora in enumerate(LORAS):
        alone = _alone(lora, slot, nf4=False, dtype=torch.float32)
        _draw_b(bank.adapter(slot), slot)
        for path, (_, b) in bank.adapter(slot).items():
            alone.get_submodule(path).lora_b.data.copy_(b)
        ours, theirs = tmp_path / f"ours-{slot}", tmp_path / f"theirs-{slot}"
        save_deltas(bank.model, ours, lora, bank.adapter(slot), base="tiny")
        save_adapter(alone, theirs, lora, base="tiny")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()
