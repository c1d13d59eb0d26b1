"""Linear layers that read the same input, fused into one product over a frozen base.

q, k and v of an attention block see one input, gate and up of an MLP another. Together they share
its quantisation and one GEMM, which is large where k's and v's alone would be small. Which layers
those are, `model/shared_inputs.py` finds out.

The layers stay where they are in the model, with their A and B: saving, resuming and the optimiser
do not know of this. Only their forward pass and the storage of their frozen weights change. One
delta rides in the product itself; the many of a `BankLinear` (`bank_linear.py`) are added to it.

Shape legend as in `kernels/int8.py`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tunefork.errors import ModelError
from tunefork.kernels import bf16_product, fp8, int8, int8_product, int8_weight
from tunefork.kernels.cuda_source import CudaSourceError
from tunefork.kernels.layout import Layout, Products, Storage
from tunefork.kernels.lora_group import lora_group
from tunefork.kernels.quantized import nf4_tensors
from tunefork.model.bank_linear import BankLinear, deltas
from tunefork.model.fused_checks import check_finite, check_sizes
from tunefork.model.joint_banks import JointBanks
from tunefork.model.linear import LoraLinear
from tunefork.model.own_rows import OwnRows
from tunefork.model.shared_inputs import find_groups

_FORMS = {("bf16", "bf16"), ("nf4", "bf16"), ("int8", "int8"), ("nf4", "int8"), ("fp8", "fp8")}
"""Storage and products that go together."""


class FusedGroup(nn.Module):
    """Linear layers with one input: a frozen (O, D) weight for all of them, and their deltas.

    The group is no module of the model; its members call it.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        storage: Storage,
        products: Products,
        device: torch.device,
    ) -> None:
        super().__init__()
        bases: list[Any] = [_base(member) for member in members]
        # With dropout a delta's input is not the base's, so it stays a product of its own; over a
        # base in e4m3, which is not trained over, each does.
        adds = products != "fp8"
        self.deltas = [
            m for m in members if adds and isinstance(m, LoraLinear) and m.dropout == 0.0
        ]
        self.banks = {
            at: m for at, m in enumerate(members) if isinstance(m, BankLinear) and m.dropout == 0.0
        }
        self.features_in: int = bases[0].in_features
        self.layout = Layout(
            storage,
            products,
            tuple(base.out_features for base in bases),
            tuple(m.lora_a.shape[0] if m in self.deltas else 0 for m in members),
            self.deltas[0].scale if self.deltas else 1.0,
        )
        if storage == "nf4":
            self.weights = tuple(t for base in bases for t in nf4_tensors(base.codes, base.state))
        else:
            self.weights = tuple(base.weight.detach().to(device) for base in bases)
        self.exact: tuple[Tensor, ...] = ()
        """The members' weights where they were, if they are rounded, until the main directions are
        set apart: along these a product is as exact as what it is told of them."""
        if products == "int8":
            self.weights = int8_weight.int8_weights(self.weights, self.layout, self.features_in)
            if storage == "int8":
                self.exact = tuple(base.weight.detach() for base in bases)
        elif products == "fp8":
            self.weights = fp8.fp8_weight(self.weights)
        elif storage == "bf16":
            self.weights = (torch.cat(self.weights),)
        self.joint: JointBanks | None = None
        """All layers' banks, where they are read token by token (`join_banks`)."""
        self.own_rows: OwnRows | None = None
        """The same on a CPU (`keep_rows`)."""
        self.input: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()
        self.is_calibrated = True
        """False: the main directions of the next pass's inputs are set apart first."""

    def output(self, index: int, x_d: Tensor, *, is_trained: bool) -> Tensor:
        """Member `index`'s y for `x_d`; the first member computes everyone's."""
        if index == 0:
            self.input, self.outputs = x_d, self(x_d, is_trained)
        elif self.input is not x_d:
            raise RuntimeError("a fused layer was given another input than its group")
        y_o = self.outputs[index]
        if index == len(self.layout.sizes) - 1:  # kept no longer than needed
            self.input, self.outputs = None, ()
        return y_o

    def forward(self, x_d: Tensor, is_trained: bool = True) -> tuple[Tensor, ...]:
        """(..., D) in the weight's dtype -> each member's (..., O_i), without its bias."""
        if self.own_rows is not None:
            found = self.own_rows.outputs(x_d.reshape(-1, self.features_in))
            return tuple(y.view(*x_d.shape[:-1], y.shape[-1]) for y in found)
        if not self.is_calibrated:
            self._set_apart(x_d.reshape(-1, self.features_in))
        lora_a = [member.lora_a for member in self.deltas]
        lora_b = [member.lora_b for member in self.deltas]
        outputs: tuple[Tensor, ...] | None = None
        if self.joint is None or not self.joint.features_out:
            if self.layout.products == "fp8":
                codes_od, scale_1o = self.weights
                outputs = fp8.fp8_linear(x_d, codes_od, scale_1o, self.layout.sizes)
            else:
                # Evaluated by bf16 products, as it is served.
                is_int8 = self.layout.products == "int8" and is_trained
                product = int8.int8_lora if is_int8 else lora_group
                outputs = product(x_d, self.layout, self.weights, lora_a, lora_b)
        if self.joint is None:
            assert outputs is not None
            return self._with_banks(x_d, outputs) if self.banks else outputs
        ys = None if outputs is None else [y.view(-1, y.shape[-1]) for y in outputs]
        found = self.joint.outputs(x_d.reshape(-1, x_d.shape[-1]), ys)
        return tuple(y.view(*x_d.shape[:-1], y.shape[-1]) for y in found)

    def _with_banks(self, x_d: Tensor, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What a bank adds is no part of the product: its slots share no scale and no operand."""
        banks = {at: bank for at, bank in self.banks.items() if sum(bank.ranks)}
        if not banks or next(iter(banks.values())).routing.mode == "none":
            return outputs
        found = deltas(list(banks.values()), x_d.reshape(-1, x_d.shape[-1]))
        whole = list(outputs)
        for at, delta in zip(banks, found, strict=True):
            whole[at] = whole[at] + delta.view_as(whole[at])
        return tuple(whole)

    @torch.no_grad()
    def join_banks(self) -> None:
        """The group is only read from now on, and every layer has a bank (`joint_banks.py`)."""
        is_bf16 = self.layout.storage == self.layout.products == "bf16"
        weight_od = self.weights[0] if is_bf16 else None
        self.joint = JointBanks([*self.banks.values()], weight_od)
        if is_bf16:
            self.weights = (self.joint.weight,)

    @torch.no_grad()
    def keep_rows(self) -> None:
        """As `join_banks`, on a CPU over a dense weight (`own_rows.py`)."""
        self.own_rows = OwnRows([*self.banks.values()], self.weights[0])

    def _set_apart(self, x_sd: Tensor) -> None:
        int8_weight.set_apart(x_sd, self.weights, self.layout, self.exact)
        self.is_calibrated, self.exact = True, ()

    @torch.no_grad()
    def materialize(self, index: int) -> Tensor:
        """Member `index`'s frozen weight, (O_i, D), in bf16 or as it came."""
        if self.layout.storage == "bf16":
            return self.weights[0][slice(*self.layout.bounds[index])]
        if self.layout.storage == "fp8":
            rows = slice(*self.layout.bounds[index])
            codes_od, scale_1o = self.weights
            return fp8.fp8_dense(codes_od[rows], scale_1o[:, rows], torch.bfloat16)
        args = self.layout, self.weights, self.features_in, torch.bfloat16
        return int8_weight.dense(*args, index, index + 1)


class FusedLinear(nn.Module):
    """A frozen layer of a group: one without a delta, or the base of one that has one."""

    def __init__(self, group: FusedGroup, index: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        object.__setattr__(self, "group", group)  # no submodule: it is everyone's
        self.group: FusedGroup
        self.index = index
        self.bias: nn.Parameter | None = bias
        self.in_features = group.features_in
        self.out_features = group.layout.sizes[index]

    def materialize(self) -> Tensor:
        """The weight, (O, D), in bf16."""
        return self.group.materialize(self.index)

    def forward(self, x_d: Tensor) -> Tensor:
        """(..., D) -> (..., O), with the delta where there is one."""
        y_o = self.group.output(self.index, x_d, is_trained=self.training)
        return y_o if self.bias is None else y_o + self.bias


def fuse(
    model: PreTrainedModel,
    storage: Storage,
    products: Products,
    device: torch.device,
    calibration_ids: Tensor | None = None,
) -> list[FusedGroup]:
    """Move the frozen weights of `model`'s linear layers, but the head's, into groups on `device`.

    In place, group by group, so that a model in host memory never takes more of a GPU than one of
    its groups does beside the quantised rest. Layers that are trained whole stay as they are.

    int8 products have the main directions of inputs such as those of `calibration_ids` (rows,
    length) multiplied apart (`kernels/directions.py`), found in a pass of their own; None: none.

    Raises ModelError where a layer's size is none that such products take, where a weight is not
    finite, or where the GPU's kernel cannot be had; ValueError for a storage and products that do
    not go together.
    """
    if (storage, products) not in _FORMS:
        raise ValueError(f"a base kept in {storage} has no {products} products")
    if device.type == "cuda":
        _check_kernel(model, products, device)
    groups = []
    for paths in find_groups(model):
        members = [model.get_submodule(path) for path in paths]
        if products != "bf16":
            check_sizes(dict(zip(paths, map(_base, members), strict=True)), products)
        group = FusedGroup(members, storage, products, device)
        if calibration_ids is None:
            group.exact = ()
        check_finite(group.weights, paths)
        for index, (path, member) in enumerate(zip(paths, members, strict=True)):
            if isinstance(member, LoraLinear | BankLinear):
                member.base = FusedLinear(group, index, _base(member).bias)
                member.base_adds_delta = member in group.deltas or index in group.banks
            else:
                parent, _, name = path.rpartition(".")
                fused = FusedLinear(group, index, _base(member).bias)
                setattr(model.get_submodule(parent), name, fused)
        groups.append(group)
        _owner(model, paths[0]).register_forward_pre_hook(partial(_forget, group))
    model.to(device)
    if products == "int8" and calibration_ids is not None:
        calibrate(model, groups, calibration_ids.to(device))
    return groups


def _check_kernel(model: PreTrainedModel, products: Products, device: torch.device) -> None:
    """Raises ModelError where it errs or cannot be had. bf16's is for what is trained only, in int8
    too, as evaluation has bf16 products: a server's are PyTorch's."""
    instead = "bf16"
    try:
        if products == "int8":
            int8_product.check_kernel(device)
        if products != "fp8" and any(p.requires_grad for p in model.parameters()):
            instead = "fp32"  # whatever the products: bf16 alone would fail here too
            bf16_product.check_kernel(device)
    except CudaSourceError as error:
        raise ModelError(
            f"train.precision: {products} has no kernel here: {error}; set {instead}"
        ) from error


@torch.no_grad()
def calibrate(model: PreTrainedModel, groups: Sequence[FusedGroup], ids: Tensor) -> None:
    """Set each group's directions by its inputs in a pass over `ids` (rows, length).

    A group sees what those before it leave as they are evaluated. A second time codes are all that
    is known of a weight, and what it is along the first time's directions.
    """
    was_training = model.training
    model.eval()
    for group in groups:
        group.is_calibrated = False
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for group in groups:  # one that the pass did not reach stays as it is
            group.is_calibrated, group.exact = True, ()
        model.train(was_training)


def _owner(model: PreTrainedModel, path: str) -> nn.Module:
    """The decoder layer that `path` lies in, or else the module there itself.

    A layer's hooks run whatever calls it (OPT's head goes past its base model), and outside of what
    is compiled.
    """
    parts = path.split(".")
    for end in range(1, len(parts)):
        module: nn.Module = model.get_submodule(".".join(parts[:end]))
        is_layer = isinstance(module, GradientCheckpointingLayer)
        if is_layer:
            return module
    own: nn.Module = model.get_submodule(path)
    return own


def _base(member: nn.Module) -> Any:
    return member.base if isinstance(member, LoraLinear | BankLinear) else member


def _forget(group: FusedGroup, *_: Any) -> None:
    group.input, group.outputs = None, ()  # of a pass that was cut short: they hold all of it
