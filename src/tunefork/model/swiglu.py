"""An MLP whose gate and up are one product over a read bank: silu(gate) * up with it.

Where few tokens decode over many adapters, gate's and up's deltas and what is made of both are one
kernel (`kernels/bank_read.py`), so that neither is written and read again. An MLP is known by its
parts, and by what it says: one that says anything else stays as it is.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefork.model.bank_linear import BankLinear
from tunefork.model.build import replace
from tunefork.model.fused import FusedGroup, FusedLinear

_SILU = ("SiLU", "SiLUActivation")


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x); `gate_proj` and `up_proj` are a fused group's two layers."""

    def __init__(self, mlp: Any, group: FusedGroup) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        object.__setattr__(self, "group", group)  # no submodule, as in `FusedLinear`
        self.group: FusedGroup

    def forward(self, x_d: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        joint = self.group.joint
        if joint is not None and joint.reads_rows:
            x_sd = x_d.reshape(-1, x_d.shape[-1])
            h_f = joint.swiglu(x_sd).view(*x_d.shape[:-1], -1)
        else:
            gate_f, up_f = self.group(x_d)
            h_f = F.silu(gate_f) * up_f
        y_d: Tensor = self.down_proj(h_f)
        return y_d


@torch.no_grad()
def fuse_swiglu(model: PreTrainedModel) -> int:
    """Give the MLPs of `model` that are one this form, in place; returns how many. Their groups'
    banks are joined already."""
    found = 0
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for path, mlp in modules:
        group = _group(mlp)
        if group is None:
            continue
        fused = SwiGLU(mlp, group)
        x_sd = torch.randn(2, group.features_in).to(model.device, model.dtype)
        if torch.allclose(fused(x_sd).float(), mlp(x_sd).float(), rtol=0.05, atol=1e-3):
            replace(model, path, fused)
            found += 1
    return found


def _group(mlp: nn.Module) -> FusedGroup | None:
    """The group of an MLP's gate and up, where it has the parts of one."""
    parts = dict(mlp.named_children())
    act = parts.pop("act_fn", None)
    if set(parts) != {"gate_proj", "up_proj", "down_proj"} or type(act).__name__ not in _SILU:
        return None
    bases = [getattr(parts[name], "base", None) for name in ("gate_proj", "up_proj")]
    if not all(isinstance(part, BankLinear) for part in parts.values()):
        return None
    gate, up = bases
    if not (isinstance(gate, FusedLinear) and isinstance(up, FusedLinear)):
        return None
    is_pair = gate.group is up.group and (gate.index, up.index) == (0, 1)
    has_bias = gate.bias is not None or up.bias is not None
    return gate.group if is_pair and len(gate.group.layout.sizes) == 2 and not has_bias else None
