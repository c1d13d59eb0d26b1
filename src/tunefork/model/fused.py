"""LoRA layers that read the same input, fused into one product over an FP8 base.

q, k and v of an attention block see one input, gate and up of an MLP another. Together they share
its quantisation and one GEMM, which is large where k's and v's alone would be small. Which layers
those are is not read from a list of names: a few tokens go through the model, and layers that are
given the very same tensor one after the other belong together.

The layers stay where they are in the model, with their A and B: saving, resuming and the optimiser
do not know of this. Only their forward pass and the storage of their frozen weights change.

Shape legend as in `kernels/fp8.py`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefork.kernels import fp8
from tunefork.model.linear import Fp8Linear, LoraLinear


class Fp8Group(nn.Module):
    """LoRA layers with one input: a frozen (O, D) weight in e4m3 for all of them."""

    def __init__(self, members: Sequence[LoraLinear]) -> None:
        super().__init__()
        first = members[0]
        weight_od = torch.cat([member.materialize() for member in members])
        rank = sum(member.lora_a.shape[0] for member in members)
        self.weight = fp8.quantize_weight(weight_od, rank=rank)
        self.members = list(members)  # a list: they are modules of the model, not of this one
        self.sizes = [member.base.out_features for member in members]
        self.scale = first.scale
        self.input: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def bank(self) -> tuple[Tensor, Tensor]:
        """A (R, D) of all members one below the other, and their B (O, R) as a block diagonal."""
        a_rd = torch.cat([member.lora_a for member in self.members])
        return a_rd, torch.block_diag(*[member.lora_b for member in self.members])

    def output(self, index: int, x_d: Tensor) -> Tensor:
        """Member `index`'s y for `x_d`; the first member computes everyone's."""
        if index == 0:
            self.input, self.outputs = x_d, self(x_d)
        elif self.input is not x_d:
            raise RuntimeError("a fused layer was given another input than its group")
        y_o = self.outputs[index]
        if index == len(self.members) - 1:  # kept no longer than needed
            self.input, self.outputs = None, ()
        return y_o

    def forward(self, x_d: Tensor) -> tuple[Tensor, ...]:
        """(..., D) in bf16 -> each member's (..., O_i)."""
        y_o = fp8.fp8_lora_linear(x_d, self.weight, *self.bank(), self.scale)
        return tuple(
            part if member.base.bias is None else part + member.base.bias
            for part, member in zip(y_o.split(self.sizes, dim=-1), self.members, strict=True)
        )

    @torch.no_grad()
    def write_delta(self) -> None:
        """Take over A and B as they are now; due after every change of theirs."""
        fp8.write_delta(self.weight, *self.bank(), self.scale)


def fuse_fp8(model: PreTrainedModel) -> list[Fp8Group]:
    """Move the frozen weights under `model`'s LoRA layers into FP8 groups, in place."""
    groups = []
    for members in find_groups(model):
        group = Fp8Group(members)
        for index, member in enumerate(members):
            base = member.base
            start = sum(group.sizes[:index])
            rows = slice(start, start + group.sizes[index])
            member.base = Fp8Linear(group.weight, rows, base.bias)
            member.fused = partial(group.output, index)
        group.write_delta()
        groups.append(group)
    return groups


@torch.no_grad()
def find_groups(model: PreTrainedModel) -> list[list[LoraLinear]]:
    """Runs of LoRA layers that are given the very same input, in the order of the forward pass."""
    seen: list[tuple[Tensor, LoraLinear]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, LoraLinear)
        seen.append((inputs[0], module))

    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        ids = torch.arange(4, device=model.device)[None]
        model(input_ids=ids, position_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[LoraLinear]] = []
    last: Tensor | None = None
    for given, layer in seen:
        if given is last:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        last = given
    return groups
