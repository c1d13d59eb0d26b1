"""Products of codes with the narrow ones inside, int8 and e4m3, beside cuBLAS: a trial.

    python -m benchmarks.h200_products          a Hopper GPU, nvcc

LoRA's FP8 products are cuBLAS's, of e4m3 codes that are widened by columns for the delta and the
directions apart (`kernels/fp8.py`). `h200_products.cu` has those in bf16 in the same kernel, and
codes may be int8, which cuBLAS has no scaled product of. This says what a step's products take so:
of an 8B model's four groups of layers, forward and backward, for 16,384 tokens. Each form is
checked against float64 first, at sizes that fill no tile too.

The GPU's clock falls while products run, so forms take turns, and a row has each one's median.
Writes results/h200_products.json.
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.training_runs import versions
from tunefork.kernels.e4m3 import E4M3, LARGEST

TOKENS = 16_384
_LAUNCHES, _TURNS = 8, 5
_ARCHITECTURE = "arch=compute_90a,code=sm_90a"
_THREADS, _STAGE_BYTES, _PART_BYTES = 384, 49_152, 8192
"""As in `h200_products.cu`."""
_DYNAMIC_MEMORY = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""


class Product(NamedTuple):
    """(TOKENS, K) by (N, K)."""

    name: str
    features_out: int
    features_in: int
    narrow: int
    """Columns of the bf16 operands: ranks of 16 and, forward, 48 directions."""
    widening: int
    """Columns of codes that stand for them today (`Layout.width`, `Layout.back_width`)."""


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


class Form(NamedTuple):
    """How the kernel is built."""

    name: str
    is_float: bool
    stages: int = 4
    batch: int = 1
    buffers: int = 2
    group: int = 8


FORMS = (
    Form("int8", False),
    Form("int8, all of y at once", False, stages=3, batch=4, buffers=1),
    Form("int8, half of y at once", False, batch=2, buffers=1),
    Form("int8, groups of 16", False, group=16),
    Form("e4m3", True),
    Form("e4m3, all of y at once", True, stages=3, batch=4, buffers=1),
)


class Kernel:
    """One form, built and loaded."""

    def __init__(self, form: Form, folder: Path) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        image = build(form, folder).read_bytes()
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self.driver.cuModuleLoadData(ctypes.byref(module), image))
        self._check(
            self.driver.cuModuleGetFunction(ctypes.byref(self.function), module, b"products")
        )
        self.memory = form.stages * _STAGE_BYTES + 2 * form.batch * form.buffers * _PART_BYTES
        self._check(self.driver.cuFuncSetAttribute(self.function, _DYNAMIC_MEMORY, self.memory))
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        self.blocks = processors // 2 * 2

    def __call__(
        self,
        a_mk: Tensor,
        b_nk: Tensor,
        narrow: tuple[Tensor, Tensor] | None,
        scale_m: Tensor,
        scale_n: Tensor | None,
        y_mn: Tensor,
    ) -> Tensor:
        """y = (a b^T) * scale_m * scale_n + u v^T, written into `y_mn`; `narrow` is u and v, and
        without `scale_n` it is ones."""
        u_mp, v_np = narrow or (a_mk, b_nk)
        wide = 64 if narrow else 128
        maps = [
            *(self._map(codes, 128, 128) for codes in (a_mk, b_nk)),
            *(self._map(operand, wide, 128) for operand in (u_mp, v_np)),
            self._map(y_mn, 64, 64),
        ]
        counts = (*y_mn.shape, -(-a_mk.shape[1] // 128), -(-u_mp.shape[1] // 16) if narrow else 0)
        given = [
            ctypes.c_void_p(scale_m.data_ptr()),
            ctypes.c_void_p(None if scale_n is None else scale_n.data_ptr()),
            *(ctypes.c_int(count) for count in counts),
        ]
        addresses = [address for _, address in maps] + [ctypes.addressof(one) for one in given]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(
            self.driver.cuLaunchKernel(
                *(self.function, self.blocks, 1, 1, _THREADS, 1, 1, self.memory, stream),
                (ctypes.c_void_p * len(addresses))(*addresses),
                None,
            )
        )
        return y_mn

    def _map(self, rows: Tensor, columns: int, count: int) -> tuple[Any, int]:
        """A CUtensorMap of `rows` for boxes of `count` rows by `columns`, and where it lies."""
        is_bf16 = rows.dtype == torch.bfloat16
        room = ctypes.create_string_buffer(192)
        at = -(-ctypes.addressof(room) // 64) * 64
        sizes = (ctypes.c_uint64 * 2)(rows.shape[1], rows.shape[0])
        pitch = (ctypes.c_uint64 * 1)(rows.stride(0) * rows.element_size())
        box, steps = (ctypes.c_uint32 * 2)(columns, count), (ctypes.c_uint32 * 2)(1, 1)
        kind, swizzle_128, promotion = 9 if is_bf16 else 0, 3, 2
        start = ctypes.c_void_p(rows.data_ptr())
        self._check(
            self.driver.cuTensorMapEncodeTiled(
                *(ctypes.c_void_p(at), kind, 2, start, sizes, pitch, box, steps),
                *(0, swizzle_128, promotion, 0),
            )
        )
        return room, at

    def _check(self, status: int) -> None:
        if status:
            raise SystemExit(f"CUDA's driver answered {status}")


def build(form: Form, folder: Path) -> Path:
    """The form's machine code; raises CalledProcessError where it is not compiled."""
    source = Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")
    kind = "f32.e4m3.e4m3" if form.is_float else "s32.s8.s8"
    signs = ", 1, 1" if form.is_float else ""
    wrappers = _wrapper("multiply_codes", f"m64n256k32.{kind}", signs)
    wrappers += _wrapper("multiply_bf16", "m64n256k16.f32.bf16.bf16", ", 1, 1, 0, 0")
    file = folder / f"{form.name.replace(' ', '_').replace(',', '')}.cu"
    file.write_text(source.replace("\n//WGMMA//\n", f"\n{wrappers}\n"), encoding="utf-8")
    named = {
        "FLOATS": int(form.is_float),
        "STAGES": form.stages,
        "GROUP": form.group,
        "BATCH": form.batch,
        "BUFFERS": form.buffers,
    }
    told = [f"-D{name}={value}" for name, value in named.items()]
    made = file.with_suffix(".cubin")
    subprocess.run(
        ["nvcc", f"-gencode={_ARCHITECTURE}", "-cubin", *told, "-o", made, file], check=True
    )
    return made


def _wrapper(name: str, shape: str, signs: str) -> str:
    registers = ", ".join(f"%{i}" for i in range(128))
    results = ", ".join(f'"+r"(d[{i}])' for i in range(128))
    return (
        f"__device__ __forceinline__ void {name}(int (&d)[128], u64 a, u64 b, int adds) {{\n"
        '  asm volatile("{\\n.reg .pred p;\\nsetp.ne.b32 p, %130, 0;\\n'
        f'wgmma.mma_async.sync.aligned.{shape} {{{registers}}}, %128, %129, p{signs};\\n}}\\n"\n'
        f'               : {results} : "l"(a), "l"(b), "r"(adds));\n}}\n'
    )


def draw(rows: int, columns: int, *, is_float: bool) -> Tensor:
    """Codes of a normal distribution whose largest number in a few thousand is the scale's."""
    values = torch.randn(rows, columns, device="cuda")
    if is_float:
        return values.mul_(LARGEST / 4.2).clamp_(-LARGEST, LARGEST).to(E4M3)
    return values.mul_(127 / 4.2).round_().clamp_(-127, 127).to(torch.int8)


def error(kernel: Kernel, form: Form, size: tuple[int, int, int, int]) -> float:
    """Of y from float64's, relative; bf16's rounding alone is 0.0017."""
    m, n, k, p = size
    a_mk, b_nk = (draw(rows, k, is_float=form.is_float) for rows in (m, n))
    scale_m, scale_n = (torch.rand(rows, device="cuda") + 0.5 for rows in (m, n))
    y_mn = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
    narrow, exact = None, a_mk.double() @ b_nk.double().t() * scale_m[:, None] * scale_n
    if p:  # as large as the rest
        each = float((exact.square().mean() / p).sqrt().sqrt())
        u_mp, v_np = ((each * torch.randn(rows, p, device="cuda")).bfloat16() for rows in (m, n))
        narrow, exact = (u_mp, v_np), exact + u_mp.double() @ v_np.double().t()
    kernel(a_mk, b_nk, narrow, scale_m, scale_n, y_mn)
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


def measure(product: Product, kernels: dict[Form, Kernel]) -> dict[str, Any]:
    """Each form's median time, in turns."""
    n, k = product.features_out, product.features_in
    wide = k + product.widening
    ints, floats = ([draw(rows, k, is_float=f) for rows in (TOKENS, n)] for f in (False, True))
    widened = [draw(rows, wide, is_float=True) for rows in (TOKENS, n)]
    scale_m, scale_n = (torch.rand(rows, device="cuda") + 0.5 for rows in (TOKENS, n))
    u, v = (torch.randn(rows, product.narrow, device="cuda").bfloat16() for rows in (TOKENS, n))
    y = torch.empty(TOKENS, n, dtype=torch.bfloat16, device="cuda")

    def of_form(form: Form, kernel: Kernel) -> Callable[[], object]:
        a, b = floats if form.is_float else ints
        return lambda: kernel(a, b, (u, v), scale_m, scale_n, y)

    def cublas(a: Tensor, b: Tensor) -> Callable[[], object]:
        scales = {"scale_a": scale_m[:, None], "scale_b": scale_n[None]}
        return lambda: torch._scaled_mm(
            a, b.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    calls = {form.name: of_form(form, kernel) for form, kernel in kernels.items()}
    calls["cuBLAS e4m3, widened"], calls["cuBLAS e4m3, codes alone"] = (
        cublas(*widened),
        cublas(*floats),
    )
    calls["torch._int_mm, codes alone"] = lambda: torch._int_mm(ints[0], ints[1].t())
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
    rows: list[dict[str, Any]] = []
    torch.manual_seed(0)
    torch.zeros(1, device="cuda")  # CUDA's context, which the driver's calls need
    with tempfile.TemporaryDirectory() as folder:
        kernels = {form: Kernel(form, Path(folder)) for form in FORMS}
    for form, kernel in kernels.items():
        errors = [error(kernel, form, size) for size in SIZES]
        print(form.name, *(f"{found:.2e}" for found in errors), flush=True)
        if not max(errors) < 0.002:
            raise SystemExit(f"{form.name}: off by {errors} at {SIZES}")
        rows.append({"case": f"{form.name}: checked", "errors": errors})
    sums: dict[str, float] = {}
    for product in PRODUCTS:
        row = measure(product, kernels)
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
