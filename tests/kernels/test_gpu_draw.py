"""The Triton kernel that draws tokens against its definition, on a GPU."""

import random

import pytest
import torch
from torch import Tensor

from tunefork.kernels.draw import draw, draw_reference
from tunefork.serve.engines.choose import Choice, draw_rows, greedy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _told(rows: int, dice: random.Random) -> Tensor:
    told = [
        (
            row,
            dice.choice((1e-4, 0.5, 1.0, 2.0)),
            dice.choice((0, 0, 3, 50, 10**6)),
            dice.choice((1.0, 1.0, 0.9, 0.99, 1e-9)),
            dice.choice((0.0, dice.random(), dice.random(), 1.0 - 2.0**-53)),
        )
        for row in range(rows)
    ]
    return torch.tensor(told, dtype=torch.float64)


def _logits(rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Peaked ones and flat ones."""
    made = torch.Generator().manual_seed(vocabulary)
    sharpness_r1 = torch.linspace(0.0, 6.0, rows)[:, None]
    return (torch.randn(rows, vocabulary, generator=made) * sharpness_r1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocabulary", [97, 8192, 49152, 128_256, 151_937])
def test_the_kernel_is_the_definition(vocabulary: int, dtype: torch.dtype) -> None:
    """But for numbers that lie between two tokens by less than the exponential's rounding."""
    logits, dice = _logits(64, vocabulary, dtype), random.Random(0)
    logits[5, 1:] = -torch.inf
    same = 0
    for _ in range(4):
        told = _told(64, dice)
        expected = logits.float().argmax(-1)
        expected[7] = -1
        found = expected.cuda()
        draw_reference(logits, expected, told)
        draw(logits.cuda(), found, told)
        same += int((found.cpu() == expected).sum())
        assert int(found[7]) == -1
    assert same >= 4 * 64 - 4


def test_a_row_is_its_own_among_any_others() -> None:
    """Bit for bit, as the definition's."""
    logits, told = _logits(64, 128_256, torch.bfloat16).cuda(), _told(64, random.Random(1))
    best = logits.argmax(-1)
    whole = best.clone()
    draw(logits, whole, told)
    for rows in ([0], [63, 1], list(range(17, 40)), list(range(64))[::-1]):
        few = best[rows].clone()
        own = told[rows].clone()
        own[:, 0] = torch.arange(len(rows))
        draw(logits[rows], few, own)
        assert torch.equal(few, whole[rows])


def test_shares_are_the_softmaxs() -> None:
    """Numbers that lie evenly, each a row of its own: to within one of them for each token."""
    number = 20_000
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0)).cuda() * 2
    told = torch.zeros(number, 5, dtype=torch.float64)
    told[:, 0], told[:, 1], told[:, 3] = torch.arange(number), 0.7, 1.0
    told[:, 4] = (torch.arange(number) + 0.5) / number
    tokens = logits.argmax(-1).repeat(number)
    draw(logits.expand(number, -1), tokens, told)
    shares = tokens.bincount(minlength=500) / number
    assert (shares - (logits[0] / 0.7).softmax(-1)).abs().max() < 1.2 / number


def test_drawing_waits_for_nothing() -> None:
    """The numbers go to a GPU that is busy, and the host goes on."""
    logits = torch.randn(8, 1000, device="cuda").bfloat16()
    choices = {row: Choice(1.0, 50, 0.9, 0.1 * row) for row in range(8)}
    expected = greedy(logits)
    draw_rows(logits, expected, choices)  # compiled, and pinned memory is there
    tokens = greedy(logits)
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)
    draw_rows(logits, tokens, choices)
    assert not torch.cuda.current_stream().query()
    assert torch.equal(tokens, expected)
