"""The int8 product with its narrow bf16 ones inside, beside cuBLAS's products, on a Hopper GPU.

    python -m benchmarks.h200_products

`kernels/int8_product.py` has the products for LoRA's delta and for the directions apart in the same
kernel as the codes' own. Of an 8B model's four groups of layers, forward and backward, for 16,384
tokens this says what they take so, and what cuBLAS takes: in e4m3 with scales, the codes alone, and
widened by the columns of codes that stood for the narrow products before there was int8; in int8
without scales (`torch._int_mm`, whose results are int32); in bf16, with nothing beside it, added
onto the delta, and by our kernel with the delta inside (`kernels/bf16_product.py`). int8's is
checked against float64 first, at sizes that fill no tile too.

The GPU's clock falls while products run, so forms take turns, and a row has each one's median.
Writes results/h200_products.json.
"""

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.training_runs import versions
from tunefork.kernels.bf16_product import bf16_product
from tunefork.kernels.e4m3 import E4M3
from tunefork.kernels.e4m3 import LARGEST as LARGEST_E4M3
from tunefork.kernels.fp8 import scaled_mm
from tunefork.kernels.int8_product import int8_product
from tunefork.kernels.int8_range import LARGEST

TOKENS = 16_384
_LAUNCHES, _TURNS = 8, 5
_APART = 48
"""Directions, of the narrow columns forward (`kernels/layout.py`)."""
_DEVIATIONS = 4.2
"""Of a normal distribution, that the largest number of a row is off by: what codes are over."""


class Product(NamedTuple):
    """(TOKENS, K) by (N, K)."""

    name: str
    features_out: int
    features_in: int
    narrow: int
    """Columns of the bf16 operands: ranks of 16 and, forward, 48 directions."""
    widening: int
    """Columns of e4m3 codes that stood for them."""


PRODUCTS = (
    Product("q, k, v", 6144, 4096, 96, 320),
    Product("o", 4096, 4096, 64, 192),
    Product("gate, up", 28_672, 4096, 80, 256),
    Product("down", 4096, 14_336, 64, 192),
    Product("q, k, v backward", 4096, 6144, 48, 192),
    Product("o backward", 4096, 4096, 16, 64),
    Product("gate, up backward", 4096, 28_672, 32, 128),
    Product("down backward", 14_336, 4096, 16, 64),
)
SIZES = ((128, 256, 128, 0), (256, 256, 256, 64), (1000, 624, 4096, 80), (77, 144, 592, 16))
"""M, N, K and P at which the kernel is checked."""
_BOUND = 0.002
"""Of its error; bf16's rounding alone is 0.0017."""


def int8_codes(rows: int, columns: int) -> Tensor:
    """Of a normal distribution."""
    drawn = torch.randn(rows, columns, device="cuda").mul_(LARGEST / _DEVIATIONS)
    return drawn.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)


def e4m3_codes(rows: int, columns: int) -> Tensor:
    """Of a normal distribution."""
    drawn = torch.randn(rows, columns, device="cuda").mul_(LARGEST_E4M3 / _DEVIATIONS)
    return drawn.clamp_(-LARGEST_E4M3, LARGEST_E4M3).to(E4M3)


def error(m: int, n: int, k: int, p: int) -> float:
    """Of the kernel's y from float64's, relative; the narrow products are as large as the rest."""
    a_mk, b_nk = int8_codes(m, k), int8_codes(n, k)
    scale_m1, scale_1n = (
        torch.rand(m, 1, device="cuda") + 0.5,
        torch.rand(1, n, device="cuda") + 0.5,
    )
    exact = a_mk.double() @ b_nk.double().t() * scale_m1 * scale_1n
    u_mp, v_np = None, None
    if p:
        each = float((exact.square().mean() / p).sqrt().sqrt())
        u_mp, v_np = ((each * torch.randn(rows, p, device="cuda")).bfloat16() for rows in (m, n))
        exact += u_mp.double() @ v_np.double().t()
    y_mn = int8_product(a_mk, b_nk, scale_m1, scale_1n, u_mp, v_np)
    return float((y_mn.double() - exact).norm() / exact.norm())


def milliseconds(call: Callable[[], object]) -> float:
    """Of one of some launches in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    call()
    begin.record()
    for _ in range(_LAUNCHES):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / _LAUNCHES


def measure(product: Product) -> dict[str, Any]:
    """Each form's median time, in turns."""
    n, k = product.features_out, product.features_in
    a, b = (int8_codes(rows, k) for rows in (TOKENS, n))
    floats = [e4m3_codes(rows, k) for rows in (TOKENS, n)]
    widened = [e4m3_codes(rows, k + product.widening) for rows in (TOKENS, n)]
    wide = [torch.randn(rows, k, device="cuda").bfloat16() for rows in (TOKENS, n)]
    u, v = (torch.randn(rows, product.narrow, device="cuda").bfloat16() for rows in (TOKENS, n))
    scale_m1, scale_1n = (torch.rand(*shape, device="cuda") for shape in ((TOKENS, 1), (1, n)))
    calls: dict[str, Callable[[], object]] = {
        "int8, narrow products inside": lambda: int8_product(a, b, scale_m1, scale_1n, u, v),
        "int8, codes alone": lambda: int8_product(a, b, scale_m1, scale_1n, None, None),
        "cuBLAS e4m3, widened": lambda: scaled_mm(widened[0], widened[1], scale_m1, scale_1n),
        "cuBLAS e4m3, codes alone": lambda: scaled_mm(floats[0], floats[1], scale_m1, scale_1n),
        "torch._int_mm, codes alone": lambda: torch._int_mm(a, b.t()),
        "bf16, nothing beside it": lambda: torch.mm(wide[0], wide[1].t()),
    }
    # bf16 has the delta alone beside it, and the input gradient's weight as it lies.
    is_back = product.name.endswith("backward")
    rank = product.narrow - (0 if is_back else _APART)
    x, weight = wide[0], wide[1].t().contiguous() if is_back else wide[1]
    own_u = u[:, :rank].contiguous()
    own_v = v[:, :rank].t().contiguous() if is_back else v[:, :rank].contiguous()
    factors = (weight, own_v) if is_back else (weight.t(), own_v.t())
    calls |= {
        "bf16, delta inside": lambda: bf16_product([x], weight, own_u, own_v, is_turned=is_back),
        "bf16, added onto the delta by cuBLAS": lambda: torch.mm(own_u, factors[1]).addmm_(
            x, factors[0]
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_TURNS):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    return {
        "case": product.name,
        "m_n_k": [TOKENS, n, k],
        "narrow": product.narrow,
        "widening": product.widening,
        "ms": {name: median(found) for name, found in times.items()},
    }


def main() -> None:
    """Check, measure, and write the table."""
    torch.manual_seed(0)
    errors = [error(*size) for size in SIZES]
    print("errors", *(f"{found:.2e}" for found in errors), flush=True)
    if not max(errors) < _BOUND:
        raise SystemExit(f"the int8 product is off by {errors} at {SIZES}")
    rows: list[dict[str, Any]] = [{"case": "checked", "errors": errors}]
    sums: dict[str, float] = {}
    for product in PRODUCTS:
        row = measure(product)
        rows.append(row)
        for name, took in row["ms"].items():
            sums[name] = sums.get(name, 0.0) + took
        print(product.name, {name: round(took, 3) for name, took in row["ms"].items()}, flush=True)
    rows.append({"case": "a layer", "ms": sums})
    print({name: round(took, 2) for name, took in sums.items()})
    results.write(
        "h200_products",
        rows,
        device=torch.cuda.get_device_name(),
        command="python -m benchmarks.h200_products",
        versions=versions(),
    )


if __name__ == "__main__":
    main()
