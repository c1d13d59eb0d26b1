"""Fused FP8 groups against the layers that they stand in for."""

import torch
import torch.nn.functional as F

from tests.tiny import tiny_model
from tunefork.model.build import build
from tunefork.model.fused import find_groups, fuse_fp8
from tunefork.model.linear import LoraLinear
from tunefork.recipe import LoraSection, Method

IDS = torch.arange(3, 67).view(2, 32)


def _trained(name: str = "llama") -> torch.nn.Module:
    model = tiny_model(name).bfloat16()
    build(model, Method.LORA, LoraSection(rank=4), seed=0)
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
    names = {module: path for path, module in model.named_modules()}
    found = [[names[m].rpartition(".")[2] for m in group] for group in find_groups(model)]
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert found == block * 2


def test_loss_and_gradients_point_where_the_plain_layers_do() -> None:
    plain, fused = _trained(), _trained()
    groups = fuse_fp8(fused)
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
            # e4m3's rounding passes through two layers of a random model, whose sums cancel.
            assert F.cosine_similarity(want.grad.flatten(), got[name].grad.flatten(), 0) > 0.9, name


def test_a_written_delta_is_heeded() -> None:
    model = _trained()
    groups = fuse_fp8(model)
    before = model(input_ids=IDS).logits
    with torch.no_grad():
        for group in groups:
            for member in group.members:
                member.lora_b.zero_()
            group.write_delta()
    without = model(input_ids=IDS).logits
    assert (before - without).abs().max() > 0.05
