"""Candidates for the engine: a LoRA delta scale * u B^T, added to a product in one pass, or written
where the product is then added to it.

`h200_kernels.py` times them beside `addmm_`, which the engine uses. In an 8B model's step in bf16
all these updates read and write 86 GB, 20 ms at the rate of a copy; cuBLAS takes about 32, as a
product of 16 columns is nothing for its tiles. Written first, half of that is left, and the product
reads it while it computes; y is rounded once less. Not in the engine before it was measured.

Shape legend: S tokens, R columns of u (16 to 64), O features.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["num_rows"])
def _update(
    y, stride_y, u, stride_u, b, stride_b_o, stride_b_r, num_rows, features, scale,
    rank: tl.constexpr, block_r: tl.constexpr, block_s: tl.constexpr, block_o: tl.constexpr,
    adds: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * block_o + tl.arange(0, block_o)
    row = tl.program_id(1) * block_s + tl.arange(0, block_s)
    place = tl.arange(0, block_r)
    mask_o, mask_s, mask_r = column < features, row < num_rows, place < rank
    at = row.to(tl.int64)
    y_at = y + at[:, None] * stride_y + column[None, :]
    mask = mask_s[:, None] & mask_o[None, :]
    u_sr = tl.load(
        u + at[:, None] * stride_u + place[None, :], mask=mask_s[:, None] & mask_r[None, :],
        other=0.0,
    )  # fmt: skip
    b_ro = tl.load(
        b + place[:, None] * stride_b_r + column[None, :] * stride_b_o,
        mask=mask_r[:, None] & mask_o[None, :], other=0.0,
    )  # fmt: skip
    total = scale * tl.dot(u_sr, b_ro)
    if adds:
        total += tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_at, total.to(y.dtype.element_ty), mask=mask)


def rank_update_(
    y_so: Tensor,
    u_sr: Tensor,
    b_ro: Tensor,
    scale: float,
    cut: tuple[int, int, int],
    adds: bool = True,
) -> None:
    """Update y in place, or write it; columns of y and u lie side by side, b may be turned.

    `cut`: rows and columns of a tile, and its warps.
    """
    (tokens, features), rank = y_so.shape, u_sr.shape[1]
    block_s, block_o, warps = cut
    _update[(triton.cdiv(features, block_o), triton.cdiv(tokens, block_s))](
        y_so,
        y_so.stride(0),
        u_sr,
        u_sr.stride(0),
        b_ro,
        b_ro.stride(1),
        b_ro.stride(0),
        tokens,
        features,
        scale,
        rank,
        max(16, triton.next_power_of_2(rank)),
        block_s,
        block_o,
        adds,
        num_warps=warps,
    )


CUTS = ((64, 128, 4), (64, 256, 8), (128, 128, 8), (32, 256, 4), (64, 64, 4), (16, 512, 4))

"""Tried in turn."""
