"""Many adapters in one pass on a GPU: kernels against the definition, and groups that are compiled
and captured against launched ones."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.test_bank import LENGTHS, RANKS, SCALES
from tests.train.groups import run
from tests.train.test_gpu_engine import CONFIG
from tunefork.data.example import Encoded
from tunefork.kernels import reference
from tunefork.kernels.adamw_slots import adamw_slots_, slot_norms
from tunefork.kernels.bank import Padded, grouped, padded_rank, spans
from tunefork.kernels.bank_tokens import bank_tokens
from tunefork.kernels.layout import Products, Storage
from tunefork.model import attention
from tunefork.model.add_bank import add_bank
from tunefork.model.bank import Bank, BankAdapter
from tunefork.model.build import quantize_nf4
from tunefork.model.fused import fuse
from tunefork.model.head import find_head
from tunefork.model.layers import prepare_layers
from tunefork.recipe import LoraSection
from tunefork.train import deterministic
from tunefork.train.member import Member, MemberFailed, MemberStep
from tunefork.train.runner import Runner
from tunefork.train.together import Group, GroupSettings

pytestmark = pytest.mark.gpu
FEATURES, OUT = 256, 384
TIMES = 13  # so that segments begin anywhere


def _operands(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((TIMES * sum(LENGTHS), FEATURES), (sum(RANKS), FEATURES), (sum(RANKS), OUT))
    x, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.bfloat16().cuda(), (a / 16).cuda(), (b / 4).cuda()


def _grouped(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    padded = Padded.of(RANKS, padded_rank(RANKS), SCALES, "cuda")
    ends = torch.tensor(LENGTHS).mul(TIMES).cumsum(0).int().cuda()
    return grouped(x, ends, [a], [b], [0], [padded])[0]


def test_grouped_products_are_the_definitions() -> None:
    x, a, b = (t.requires_grad_() for t in _operands())
    slots = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS) * TIMES).cuda()
    dy = torch.randn(len(x), OUT, device="cuda").bfloat16()
    found: list[list[Tensor]] = []
    for is_ours in (True, False):
        x.grad = a.grad = b.grad = None
        if is_ours:
            y = _grouped(x, a, b)
        else:
            own = [(a[s:e], b[s:e].t()) if s < e else (None, None) for s, e in spans(RANKS)]
            zero = torch.zeros(OUT, FEATURES, device="cuda").bfloat16()
            lora_a, lora_b = zip(*own, strict=True)
            y = reference.bank_linear(x, zero, None, slots, lora_a, lora_b, SCALES)
        y.backward(dy)
        assert x.grad is not None and a.grad is not None and b.grad is not None
        found.append([y.detach(), x.grad.clone(), a.grad.clone(), b.grad.clone()])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).float().norm() < 1e-2 * theirs.float().norm()


def test_an_adapter_that_is_not_finite_changes_no_bit_of_the_others() -> None:
    found = []
    start, end = spans(RANKS)[3]
    first = TIMES * sum(LENGTHS[:3])
    own = torch.ones(TIMES * sum(LENGTHS), dtype=torch.bool)
    own[first : first + TIMES * LENGTHS[3]] = False
    for value in (1.0, float("nan")):
        x, a, b = _operands()
        a[start:end] *= value
        b[start:end] *= value
        for tensor in (x, a, b):
            tensor.requires_grad_()
        y = _grouped(x, a, b)
        dy = torch.ones_like(y)
        dy[~own] *= value
        y.backward(dy)
        assert x.grad is not None and a.grad is not None and b.grad is not None
        rows = [q for q in range(sum(RANKS)) if not start <= q < end]
        found.append([y.detach()[own], x.grad[own], a.grad[rows], b.grad[rows]])
    for sick, healthy in zip(*found, strict=True):
        assert torch.equal(sick, healthy) and bool(sick.isfinite().all())


def test_each_token_reads_the_adapter_that_it_names() -> None:
    torch.manual_seed(0)
    a = torch.randn(5, 16, FEATURES, device="cuda").bfloat16() / 16
    b = torch.randn(5, 16, OUT, device="cuda").bfloat16() / 4
    x = torch.randn(333, FEATURES, device="cuda").bfloat16()
    index = torch.randint(-1, 5, (333,), dtype=torch.int32, device="cuda")
    zero = torch.zeros(OUT, FEATURES, device="cuda").bfloat16()
    expected = reference.bank_linear(
        x, zero, None, index, list(a), list(b.transpose(1, 2)), [1.0] * 5
    )
    found = bank_tokens(x, index, a, b)
    assert not found[index < 0].any()
    assert (found - expected).float().norm() < 1e-2 * expected.float().norm()


def test_the_update_is_the_cpus() -> None:
    torch.manual_seed(0)
    p, g, m, v = (torch.randn(64, 128) for _ in range(4))
    v.square_()
    slot_b = torch.arange(64, dtype=torch.int32) % 3
    factors = torch.tensor([[0.99, 0.1, 0.5, 0.1, 0.01, 2.0, 1e-8, due] for due in (1.0, 0.0, 1.0)])
    g[1] = torch.nan  # of the slot that is not due
    at = torch.stack([torch.arange(s, 64, 3)[:21] for s in range(3)]).int()
    p_gpu, g_gpu, m_gpu, v_gpu = (tensor.cuda() for tensor in (p, g, m, v))
    norms = slot_norms(g_gpu, at.cuda())
    torch.testing.assert_close(norms.cpu(), slot_norms(g, at), equal_nan=True)
    adamw_slots_(p_gpu, g_gpu, m_gpu, v_gpu, slot_b.cuda(), factors.cuda())
    adamw_slots_(p, g, m, v, slot_b, factors)
    for ours, theirs in ((p_gpu, p), (m_gpu, m), (v_gpu, v)):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)
    assert not g_gpu.any() and not g.any()


LORAS = [LoraSection(rank=rank) for rank in (8, 16, 64, 4)]
FORMS: list[tuple[Storage, Products]] = [("bf16", "bf16"), ("int8", "int8"), ("nf4", "int8")]


def _bank(storage: Storage, products: Products) -> Bank:
    from transformers import AutoModelForCausalLM

    attention.register()
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    model.to("cuda", torch.bfloat16)
    if storage == "nf4":
        quantize_nf4(model)
    bank = add_bank(model, [BankAdapter(lora, seed) for seed, lora in enumerate(LORAS)])
    fuse(model, storage, products, torch.device("cuda"))
    bank.to(torch.device("cuda"))
    return bank


def _members(length: int, rate: float = 1e-3) -> list[Member]:
    every = np.ones(length, dtype=np.bool_)
    found = []
    for at, lora in enumerate(LORAS):
        draw = np.random.default_rng(at)
        rows = draw.integers(3, CONFIG.vocab_size, (2, length)).astype(np.int32)
        data = [Encoded(f"row {i}", row, every) for i, row in enumerate(rows)]
        steps = [[step % 2] for step in range(8)]
        found.append(Member(f"m{at}", lora, at, data, steps, [rate] * 8))
    return found


def _group(form: tuple[Storage, Products], members: list[Member], *, is_fast: bool) -> Group:
    bank = _bank(*form)
    if is_fast:
        prepare_layers(bank.model, "none", compiles=True)
    head = find_head(bank.model)
    assert head.takes_segments
    runner = Runner(bank.model, head, captures=is_fast, bank=bank)
    return Group(bank, members, GroupSettings(4096), runner=runner)


@pytest.mark.parametrize("length", [128, 100])
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_replayed_passes_train_as_launched_ones(
    form: tuple[Storage, Products], length: int
) -> None:
    members = _members(length)
    fast, plain = (_group(form, members, is_fast=is_fast) for is_fast in (True, False))
    found = []
    for group in (fast, plain):
        losses: dict[str, list[float]] = {m.name: [] for m in members}
        for event in run(group):
            if isinstance(event, MemberStep):
                losses[event.name].append(event.record.loss)
        found.append(losses)
    assert fast.runner.graphs and not plain.runner.graphs
    for name in found[0]:
        assert len(found[0][name]) == 8
        assert found[0][name] == pytest.approx(found[1][name], rel=5e-3), name
        assert found[0][name][-1] < found[0][name][0]


def test_a_step_does_not_wait_for_the_gpu() -> None:
    group = _group(("bf16", "bf16"), _members(128), is_fast=True)
    for _ in range(4):
        group.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        events = group.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [e.record.step for e in events if isinstance(e, MemberStep)] == [4] * 4


def test_one_that_diverges_is_told_late_and_changes_no_bit_of_the_others() -> None:
    healthy = _members(128)
    sick = list(healthy)
    sick[1] = replace(healthy[1], learning_rates=[1e-3, 1e38, *[1e-3] * 6])
    deterministic.prepare(True)
    groups = [_group(("int8", "int8"), members, is_fast=True) for members in (healthy, sick)]
    with deterministic.deterministic(True):
        told = [run(group) for group in groups]
    [failed] = [event for event in told[1] if isinstance(event, MemberFailed)]
    assert failed.name == "m1" and failed.step == 3
    assert groups[1].state("m1").progress.step == 2
    for name in ("m0", "m2", "m3"):
        one, other = (group.state(name) for group in groups)
        for key, value in one.tensors.items():
            assert key.startswith("random/") or torch.equal(value, other.tensors[key]), key
