"""NF4 as an operand of an FP8 product: what it is, and that its rows' scales need no reading."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels.adamw import mix
from tunefork.kernels.e4m3 import E4M3, joined, row_scale, weight_scales
from tunefork.kernels.nf4_e4m3 import Nf4Rows, nf4_scales, rounded_at_random
from tunefork.kernels.quantized import dequantize_nf4_tensors, nf4_tensors, quantize_nf4

SEED = torch.tensor([12345, 6, 7, 8], dtype=torch.int32)


def _stored(sizes: tuple[int, ...], features_in: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    weights = [torch.randn(size, features_in).bfloat16() for size in sizes]
    weights[0][3] = 0
    weights[0][4] *= 100
    return sum((nf4_tensors(*quantize_nf4(weight)) for weight in weights), ())


def _rows(tensors: tuple[Tensor, ...], sizes: tuple[int, ...], features_in: int) -> Nf4Rows:
    return Nf4Rows(tensors, nf4_scales(tensors, sizes, features_in), SEED, sizes, features_in)


@pytest.mark.parametrize("features_in", [128, 96], ids=["whole blocks", "blocks over two rows"])
def test_rows_are_the_weight_over_its_scale(features_in: int) -> None:
    sizes = (32, 16)
    tensors = _stored(sizes, features_in)
    weight = dequantize_nf4_tensors(tensors, sizes, features_in, torch.bfloat16)
    rows = _rows(tensors, sizes, features_in)
    scale = weight_scales([row_scale(weight)])
    assert torch.equal(rows.scale_1o.t(), scale)
    units = weight.float() * scale.reciprocal()
    straight, turned = (rounded_at_random(units, SEED[at]).view(torch.uint8) for at in (1, 0))
    assert torch.equal(rows.codes().view(torch.uint8), straight)
    assert torch.equal(rows.codes_turned().view(torch.uint8), turned.t())
    assert 0.1 < float((straight != turned).float().mean()) < 0.5


def _neighbours(units: Tensor) -> tuple[Tensor, Tensor]:
    """The largest code that is no larger, and the smallest that is no smaller."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    codes = codes[codes.isfinite()].unique()
    return codes[torch.searchsorted(codes, units, right=True) - 1], codes[
        torch.searchsorted(codes, units)
    ]


def test_at_random_a_weight_becomes_a_code_beside_it_and_is_their_mean() -> None:
    torch.manual_seed(0)
    scales = torch.tensor([1e-4, 1e-2, 1.0, 20.0, 200.0])[:, None]
    units = (torch.randn(5, 64) * scales).clamp(-448, 448)
    units[0, :3] = torch.tensor([448.0, -448.0, 0.0])
    below, above = _neighbours(units)
    draws = [
        rounded_at_random(units, mix(torch.tensor(n, dtype=torch.int32))).float()
        for n in range(4000)
    ]
    for drawn in draws:
        assert ((drawn == below) | (drawn == above)).all()
    mean, step = torch.stack(draws).mean(0), above - below
    # A draw has a variance of at most a quarter of the step's square.
    assert ((mean - units).abs() <= 5 * step / 2 / 4000**0.5 + 1e-7).all()
    assert torch.equal(
        draws[0], rounded_at_random(units, mix(torch.tensor(0, dtype=torch.int32))).float()
    )


def test_weights_are_rounded_independently() -> None:
    """Of one that lies between two codes as many others, rows and columns apart, go up as down."""
    units = torch.full((256, 256), 1.0625)
    up = (rounded_at_random(units, SEED[0]).float() > 1.1).float()
    assert abs(float(up.mean()) - 0.5) < 0.02
    for shifted in (up.roll(1, 0), up.roll(1, 1), up.roll(2, 1), up.t()):
        assert abs(float((up * shifted).mean()) - 0.25) < 0.02


def test_what_stands_beside_them_is_kept() -> None:
    rows = _rows(_stored((32,), 128), (32,), 128)
    beside = torch.arange(32 * 16).remainder(100).to(torch.uint8).view(32, 16)
    wide = rows.codes(beside).view(torch.uint8)
    assert torch.equal(wide, joined([rows.codes(), beside]))
    beside = torch.arange(128 * 16).remainder(100).to(torch.uint8).view(128, 16)
    wide = rows.codes_turned(beside).view(torch.uint8)
    assert torch.equal(wide, joined([rows.codes_turned(), beside]))
