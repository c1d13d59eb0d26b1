"""Rows in int8: whole numbers of at most 127 over one fp32 scale a row.

`round_rows` makes the left operand of the product for the input's gradient: gradients of several
layers side by side; `round_apart` that of y, of x less its main directions (`directions.py`). On a
GPU they are kernels (`int8_rows_triton.py`); the definitions are here, and run elsewhere.

A row's scale takes its largest magnitude to 127, and numbers go to the nearest code, ties to even.
A row with a number that is infinite or NaN has a scale that is: what its codes are is then of no
matter, and no other row knows of it.

Shape legend: S tokens, D features (of all parts), O features out, P columns of what is read of x, m
directions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunefork.kernels.compiled import is_on_gpu
from tunefork.kernels.int8_range import LARGEST, LEAST


def scale_of(most_s1: Tensor) -> Tensor:
    """(S, 1) fp32: what takes the largest magnitude of each row, fp32, to 127."""
    return most_s1.clamp(min=LEAST) / LARGEST


def nearest(x_sd: Tensor, scale_s1: Tensor) -> Tensor:
    """x / scale in int8."""
    # Times the inverse: a GPU's division takes longer than the memory does.
    codes_sd = torch.round(x_sd.float() * scale_s1.reciprocal())
    # A NaN has no code, and conversions of one differ.
    return codes_sd.nan_to_num(0.0, 0.0, 0.0).clamp(-LARGEST, LARGEST).to(torch.int8)


def rounded(x_sd: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (S, D) int8 and scales (S, 1) fp32 of x."""
    scale_s1 = scale_of(x_sd.abs().amax(1, keepdim=True).float())
    return nearest(x_sd, scale_s1), scale_s1


def round_rows(parts: Sequence[Tensor], fold_1d: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes of [parts * fold], (S, D) int8, and scales (S, 1) fp32.

    `parts` (S, D_i) are bf16, `fold` (1, D) fp32; None: ones. One scale holds for the whole row.
    """
    if is_on_gpu(parts[0]):
        return torch.ops.tunefork.round_rows(list(parts), fold_1d)  # type: ignore[no-any-return]
    return round_rows_reference(parts, fold_1d)


def round_rows_reference(parts: Sequence[Tensor], fold_1d: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition of `round_rows`."""
    whole_sd = torch.cat([part.float() for part in parts], dim=1)
    return rounded(whole_sd if fold_1d is None else whole_sd * fold_1d)


def round_apart(x_sd: Tensor, inner_sp: Tensor, probe_md: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of x - z V^T, (S, D) int8, and scales (S, 1) fp32.

    z (S, m) are the last columns of `inner`, V^T (m, D) is `probe`; all are bf16, as x is.
    """
    if is_on_gpu(x_sd):
        return torch.ops.tunefork.round_apart(x_sd, inner_sp, probe_md)  # type: ignore[no-any-return]
    return round_apart_reference(x_sd, inner_sp, probe_md)


def round_apart_reference(
    x_sd: Tensor, inner_sp: Tensor, probe_md: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition of `round_apart`."""
    z_sm = inner_sp[:, inner_sp.shape[1] - len(probe_md) :]
    return rounded(x_sd.float() - z_sm.float() @ probe_md.float())


def turned(codes_od: Tensor) -> Tensor:
    """(D, O) of (O, D) int8, contiguous."""
    if is_on_gpu(codes_od):
        return torch.ops.tunefork.turned(codes_od)  # type: ignore[no-any-return]
    return codes_od.t().contiguous()


def _empty(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape[0], columns, dtype=torch.int8)
    return codes, x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.custom_op("tunefork::round_rows", mutates_args=(), device_types="cuda")
def _round_rows(parts: Sequence[Tensor], fold: Tensor | None) -> tuple[Tensor, Tensor]:
    from tunefork.kernels.int8_rows_triton import round_rows  # needs Triton, which comes with CUDA

    codes, scale = _empty(parts[0], sum(part.shape[1] for part in parts))
    if codes.numel():
        round_rows(parts, fold, codes, scale)
    return codes, scale


@_round_rows.register_fake
def _(parts: Sequence[Tensor], fold: Tensor | None) -> tuple[Tensor, Tensor]:
    return _empty(parts[0], sum(part.shape[1] for part in parts))


@torch.library.custom_op("tunefork::round_apart", mutates_args=(), device_types="cuda")
def _round_apart(x: Tensor, inner: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    from tunefork.kernels.int8_rows_triton import round_apart

    codes, scale = _empty(x, x.shape[1])
    if codes.numel():
        round_apart(x, inner, probe, codes, scale)
    return codes, scale


@_round_apart.register_fake
def _(x: Tensor, inner: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(x, x.shape[1])


@torch.library.custom_op("tunefork::turned", mutates_args=(), device_types="cuda")
def _turned(codes: Tensor) -> Tensor:
    from tunefork.kernels.int8_rows_triton import turned

    return turned(codes)


@_turned.register_fake
def _(codes: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[1], codes.shape[0])
