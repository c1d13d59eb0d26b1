"""SwiGLU beside the narrow products that read what it makes: an MLP's `down` layer with a LoRA.

h = silu(gate) * up is as large as its two operands. LoRA's u = A h reads it once more beside the
base's product, its gradient dA = du^T h in the backward pass too, 2 x 15 GB in a step of 16,384
tokens of an 8B model, and between the two h waits. On a GPU `kernels/gated_triton.py` makes u where
h is made, and dA where the gradients of gate and up are, with h made again in registers: nobody
keeps it. dup is written where dh was, which nobody reads any more: beside gate and up, a third new
tensor of their size would be the highest moment of a step with checkpointing. The definitions are
here, and run elsewhere.

Shape legend: S tokens, D features of gate, up and h, R rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tunefork.kernels.compiled import is_on_gpu

LARGEST_RANK = 64
"""For the kernels: a tile of A grows with the rank, and is read anew for each tile of h."""


def has_kernels(tensor: Tensor, rank: int) -> bool:
    """Whether kernels make what `tensor` is an operand of."""
    return is_on_gpu(tensor) and tensor.dtype == torch.bfloat16 and 0 < rank <= LARGEST_RANK


def gated_down(gate_sd: Tensor, up_sd: Tensor, a_rd: Tensor) -> tuple[Tensor, Tensor]:
    """h = silu(gate) * up, (S, D), and u = h A^T, (S, R).

    All of one dtype. h is computed in fp32 at least and rounded once; u is made of what is rounded,
    and summed in fp32. The kernels' bits are the same each time.
    """
    if has_kernels(gate_sd, a_rd.shape[0]):
        h_sd, u_sr = torch.ops.tunefork.gated_down(gate_sd, up_sd, a_rd)
        return h_sd, u_sr
    return gated_down_reference(gate_sd, up_sd, a_rd)


def gated_gradients(
    gate_sd: Tensor, up_sd: Tensor, dh_sd: Tensor, du_sr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and up, (S, D) each, of `dh_sd`, and dA = du^T h, (R, D).

    dh is all of h's gradient, what came through u included; it may be written over, and be up's
    gradient then. Dtypes and roundings as in `gated_down`.
    """
    if has_kernels(gate_sd, du_sr.shape[1]):
        dup_sd = dh_sd.contiguous()
        dgate_sd, da_rd = torch.ops.tunefork.gated_gradients(gate_sd, up_sd, dup_sd, du_sr)
        return dgate_sd, dup_sd, da_rd
    return gated_gradients_reference(gate_sd, up_sd, dh_sd, du_sr)


def gated_gradients_and_maxima(
    gate_sd: Tensor, up_sd: Tensor, dh_sd: Tensor, du_sr: Tensor, fold_1o: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `gated_gradients` gives, bit for bit, and the largest magnitude of each row, (S, 1): of
    [dgate | dup], as they are rounded, times `fold`. It is NaN where one is.

    `fold` (1, 2 D) and the magnitudes are fp32. dh may be written over.
    """
    if has_kernels(gate_sd, du_sr.shape[1]):
        dup_sd = dh_sd.contiguous()
        dgate_sd, da_rd, most_s1 = torch.ops.tunefork.gated_gradients_and_maxima(
            gate_sd, up_sd, dup_sd, du_sr, fold_1o
        )
        return dgate_sd, dup_sd, da_rd, most_s1
    return gated_gradients_and_maxima_reference(gate_sd, up_sd, dh_sd, du_sr, fold_1o)


def swiglu(gate_sd: Tensor, up_sd: Tensor) -> Tensor:
    """h = silu(gate) * up, computed in fp32 at least and rounded once."""
    return (F.silu(_wide(gate_sd)) * _wide(up_sd)).to(gate_sd.dtype)


def gated_down_reference(gate_sd: Tensor, up_sd: Tensor, a_rd: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `gated_down`."""
    h_sd = swiglu(gate_sd, up_sd)
    return h_sd, h_sd @ a_rd.t()


def gated_gradients_reference(
    gate_sd: Tensor, up_sd: Tensor, dh_sd: Tensor, du_sr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `gated_gradients`."""
    dtype, gate, up, dh = gate_sd.dtype, _wide(gate_sd), _wide(up_sd), _wide(dh_sd)
    share = torch.sigmoid(gate)
    silu = gate * share
    dgate_sd = (dh * up * (share + silu * (1 - share))).to(dtype)
    return dgate_sd, (dh * silu).to(dtype), du_sr.t() @ (silu * up).to(dtype)


def gated_gradients_and_maxima_reference(
    gate_sd: Tensor, up_sd: Tensor, dh_sd: Tensor, du_sr: Tensor, fold_1o: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition of `gated_gradients_and_maxima`."""
    dgate_sd, dup_sd, da_rd = gated_gradients_reference(gate_sd, up_sd, dh_sd, du_sr)
    folded = torch.cat([dgate_sd, dup_sd], dim=1).float() * fold_1o
    return dgate_sd, dup_sd, da_rd, folded.abs().amax(1, keepdim=True)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.library.custom_op("tunefork::gated_down", mutates_args=(), device_types="cuda")
def _gated_down(gate: Tensor, up: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    if gate.numel() == 0:
        return gated_down_reference(gate, up, a)
    from tunefork.kernels.gated_triton import forward  # needs Triton: it comes with CUDA

    return forward(gate, up, a)


@_gated_down.register_fake
def _(gate: Tensor, up: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape[0], a.shape[0])


@torch.library.custom_op("tunefork::gated_gradients", mutates_args=("dh",), device_types="cuda")
def _gated_gradients(gate: Tensor, up: Tensor, dh: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    """dgate and dA; dh, which is contiguous, becomes dup."""
    if gate.numel() == 0:
        dgate, _, da = gated_gradients_reference(gate, up, dh, du)
        return dgate, da
    from tunefork.kernels.gated_triton import backward

    dgate, da = backward(gate, up, dh, du)
    return dgate, da


@_gated_gradients.register_fake
def _(gate: Tensor, up: Tensor, dh: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(du.shape[1], gate.shape[1])


@torch.library.custom_op(
    "tunefork::gated_gradients_and_maxima", mutates_args=("dh",), device_types="cuda"
)
def _gated_gradients_and_maxima(
    gate: Tensor, up: Tensor, dh: Tensor, du: Tensor, fold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if gate.numel() == 0:
        dgate, _, da, most = gated_gradients_and_maxima_reference(gate, up, dh, du, fold)
        return dgate, da, most
    from tunefork.kernels.gated_triton import backward

    dgate, da, most = backward(gate, up, dh, du, fold_1o=fold.contiguous())
    return dgate, da, most


@_gated_gradients_and_maxima.register_fake
def _(
    gate: Tensor, up: Tensor, dh: Tensor, du: Tensor, fold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        gate.new_empty(gate.shape),
        gate.new_empty(du.shape[1], gate.shape[1]),
        fold.new_empty(gate.shape[0], 1),
    )
