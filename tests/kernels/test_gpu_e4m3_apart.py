"""The Triton kernel that takes directions out of rows and quantises them, on a GPU."""

import pytest
import torch
from torch import Tensor

from tests.kernels.test_e4m3_apart import operands, same_but_for_neighbours
from tunefork.kernels.e4m3 import E4M3, LARGEST, LOW
from tunefork.kernels.e4m3_apart import apart_scale, quantize_apart, quantize_apart_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(
    ("tokens", "size", "rank", "apart"),
    [
        (16_384, 4096, 16, 64),
        (512, 14_336, 48, 64),
        (33, 576, 0, 64),
        (1, 16, 1, 16),
        (7, 1040, 448, 64),
        (300, 96, 3, 32),
        (100, 96, 16, 48),
    ],
)
def test_the_kernel_is_the_definition(
    tokens: int, size: int, rank: int, apart: int, is_compiled: bool
) -> None:
    given = operands(tokens, size, rank, apart, device="cuda")
    x, inner, _, probe, balance, width = given
    if tokens > 4:
        x[1], inner[1] = 0, 0
        x[2] *= 1e4
        inner[2] *= 1e4
        x[3, 5] = 3e3
        x[4, 1] = torch.nan

    def both(x: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        scale = apart_scale(x, inner, balance)
        return quantize_apart(x, inner, apart, probe, balance, scale, width), scale

    codes, scale = (torch.compile(both, fullgraph=True) if is_compiled else both)(x, inner)
    # What lies at a power of two may go to the next one.
    share = (scale / apart_scale(x.cpu(), inner.cpu(), balance.cpu()).cuda()).nan_to_num(1.0)
    assert bool(((share == 1) | (share == 2) | (share == 0.5)).all())
    assert (share != 1).float().mean() < 1e-2
    want = quantize_apart_reference(x, inner, apart, probe, balance, scale, width)
    same_but_for_neighbours(codes, want, size + rank + apart)
    assert not codes[:, size + 3 * (rank + apart) :].float().any()


def test_a_kernel_that_took_less_out_would_be_seen() -> None:
    x, inner, apart, probe, balance, width = operands(64, 576, 16, device="cuda")
    scale = apart_scale(x, inner, balance)
    want = quantize_apart_reference(x, inner, apart, probe, balance, scale, width)
    probe[-1] = 0
    codes = quantize_apart(x, inner, apart, probe, balance, scale, width)
    with pytest.raises(AssertionError):
        same_but_for_neighbours(codes, want, 576 + 16 + apart)


@pytest.mark.parametrize("spoilt", ["x", "inner"])
def test_a_row_that_is_not_finite_leaves_the_others_alone_and_is_seen(spoilt: str) -> None:
    given = operands(200, 576, 16, device="cuda")
    before = given.codes()
    for value in (torch.nan, torch.inf):
        tensor = getattr(given, spoilt)
        kept, tensor[3, 2] = tensor[3, 2].clone(), value
        after = given.codes()
        assert (after[3].float() * given.scale()[3]).isnan().any()
        others = [row for row in range(200) if row != 3]
        assert torch.equal(after.float()[others], before.float()[others])
        tensor[3, 2] = kept


def test_rows_beyond_32_bits() -> None:
    """Of x and of the codes, of which each has more numbers."""
    from tunefork.kernels.e4m3_apart_triton import launch

    few = operands(1, 14_336, 16, device="cuda")
    tokens = 2**31 // 14_336 + 300
    x, inner = few.x.expand(tokens, -1).contiguous(), few.inner.expand(tokens, -1).contiguous()
    scale = few.scale().expand(tokens, 1).contiguous()
    codes = torch.empty(tokens, 14_336 + few.width, dtype=E4M3, device="cuda")
    launch(
        x, inner, few.apart, few.probe, few.balance, scale, codes,
        largest_code=LARGEST, low_factor=LOW,
    )  # fmt: skip
    one = few.codes().view(torch.uint8)
    assert all(
        torch.equal(part, one.expand_as(part)) for part in codes.view(torch.uint8).split(4096)
    )
