"""Rows in e4m3: 8-bit floats with 3 bits of mantissa, over one fp32 scale a row.

`quantize_rows` makes the left operand of an FP8 product: activations, or gradients of several
layers side by side, and the delta's columns. On a GPU it is one kernel that reads each row once
(`kernels/e4m3_triton.py`); the definition is here, and runs elsewhere.

Source of the format: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433.

Shape legend: S tokens, D features (of all parts), R rank (sum over layers), P columns of the
widened part.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunefork.kernels.compiled import is_on_gpu

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""e4m3's largest value."""
LEAST = 1e-30
"""What the largest magnitude of a row of zeros is taken for."""
LOW = 16.0
"""The low part is kept times this, so that it lies where e4m3 has all its bits: high's rounding
error is at most 2**-4 of high."""


def row_scale(x_sd: Tensor) -> Tensor:
    """(S, 1), fp32: what takes each row's largest magnitude to 448."""
    return x_sd.abs().amax(-1, keepdim=True).float().clamp(min=LEAST) / LARGEST


def weight_scales(rows: Sequence[Tensor]) -> Tensor:
    """(O, 1), fp32, of frozen weights one below the other, from the `row_scale` of each.

    None is less than a 256th of the largest. The delta's columns lie over the same scales: with one
    of its own, a row of zeros (a pruned one) would take them, and then x, out of range.
    """
    scale_o1 = torch.cat(list(rows))
    return torch.maximum(scale_o1, scale_o1.amax() * 2.0**-8)


def as_codes(x_sd: Tensor, scale_s1: Tensor) -> Tensor:
    """x / scale in e4m3."""
    # Times the inverse: a GPU's division takes longer than the memory does. A largest value that
    # comes out a hair above 448 is rounded to it.
    return (x_sd.float() * scale_s1.reciprocal()).to(E4M3)


def split(wide: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as high + low / 16, both in e4m3; beyond its range it saturates."""
    wide = wide.clamp(-LARGEST, LARGEST)
    high = wide.to(E4M3)
    return high, ((wide - high.float()) * LOW).to(E4M3)


def left_columns(wide: Tensor) -> list[Tensor]:
    """The left operand's columns of the delta, in the rows' units: high | low | high / 16."""
    high, low = split(wide)
    return [high, low, high.float().div(LOW).to(E4M3)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """`parts` beside each other, as bytes: PyTorch does not concatenate e4m3 everywhere."""
    return torch.cat([part.view(torch.uint8) for part in parts], dim=1)


def quantize_rows(
    parts: Sequence[Tensor],
    fold_1d: Tensor | None,
    u_sr: Tensor | None,
    balance: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Codes [parts * fold | u high | u low | u high / 16 | zeros], (S, D + P), and scales (S, 1).

    `parts` (S, D_i) and u are bf16; u is multiplied by `balance` () first. `fold` is fp32. P is
    `width` where there is a u, else 0. One scale holds for the whole row.
    """
    if is_on_gpu(parts[0]):
        return torch.ops.tunefork.quantize_rows(  # type: ignore[no-any-return]
            list(parts), fold_1d, u_sr, balance, width
        )
    return quantize_rows_reference(parts, fold_1d, u_sr, balance, width)


def quantize_rows_reference(
    parts: Sequence[Tensor],
    fold_1d: Tensor | None,
    u_sr: Tensor | None,
    balance: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    """The definition of `quantize_rows`."""
    if fold_1d is not None:
        folds = torch.split(fold_1d, [part.shape[1] for part in parts], dim=1)
        parts = [part.float() * fold for part, fold in zip(parts, folds, strict=True)]
    scale_s1 = torch.cat([row_scale(part) for part in parts], dim=1).amax(1, keepdim=True)
    if u_sr is not None and balance is not None:
        u_sr = u_sr.float() * balance
        scale_s1 = torch.maximum(scale_s1, row_scale(u_sr))
    columns = [as_codes(part, scale_s1) for part in parts]
    if u_sr is not None:
        columns += left_columns(u_sr * scale_s1.reciprocal())
        if filling := width - 3 * u_sr.shape[1]:
            columns.append(u_sr.new_zeros(len(u_sr), filling, dtype=torch.uint8))
    return (joined(columns) if len(columns) > 1 else columns[0]).view(E4M3), scale_s1


@torch.library.custom_op("tunefork::quantize_rows", mutates_args=(), device_types="cuda")
def _quantize_rows(
    parts: Sequence[Tensor],
    fold: Tensor | None,
    u: Tensor | None,
    balance: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    from tunefork.kernels.e4m3_triton import launch  # needs Triton, which comes with CUDA

    return launch(
        parts,
        fold,
        u,
        balance,
        *_empty(parts, u, width),
        least=LEAST,
        largest_code=LARGEST,
        low_factor=LOW,
    )


@_quantize_rows.register_fake
def _(
    parts: Sequence[Tensor],
    fold: Tensor | None,
    u: Tensor | None,
    balance: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    return _empty(parts, u, width)


def _empty(parts: Sequence[Tensor], u: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    rows, columns = parts[0].shape[0], sum(part.shape[1] for part in parts)
    columns += 0 if u is None else width
    return (
        parts[0].new_empty(rows, columns, dtype=E4M3),
        parts[0].new_empty(rows, 1, dtype=torch.float32),
    )
