"""Which device and dtype a run computes in, and how much memory it has taken."""

import ctypes
import gc
import os
import platform
from pathlib import Path

import psutil
import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_CPUINFO = Path("/proc/cpuinfo")


def pick_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def use_device(device: torch.device) -> None:
    """Have the calling thread launch kernels and record events on `device` where it names none.

    A thread begins with the first GPU, and an event that is recorded there waits for no other.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Dtype of weights and activations for the recipe's `train.precision`."""
    if precision == "fp32":
        return torch.float32
    if precision in ("bf16", "int8") or device.type == "cuda" or has_fast_bf16():
        return torch.bfloat16
    return torch.float32


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware; elsewhere bf16 is slowly emulated."""
    if not _CPUINFO.exists():
        return False
    flags = set(_CPUINFO.read_text().split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})  # "bf16" is Arm's name


_FP8_CAPABILITY = (8, 9)
"""First CUDA compute capability with FP8 products (Ada; Hopper is 9.0)."""


_HOPPER = (9, 0)
_INT8_CAPABILITY = (8, 0)
"""The first with asynchronous copies, bf16, and int8 products of such tiles (Ampere)."""


def has_fp8(device: torch.device | None) -> bool:
    """Whether `device` has FP8 products."""
    is_cuda = device is not None and device.type == "cuda"
    return is_cuda and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


def has_int8(device: torch.device | None) -> bool:
    """Whether `device` has what int8 products take (`kernels/int8_product.py`)."""
    is_cuda = device is not None and device.type == "cuda"
    return is_cuda and torch.cuda.get_device_capability(device) >= _INT8_CAPABILITY


def has_timed_int8(device: torch.device | None) -> bool:
    """Whether `device` is a GPU of the kind that int8 products were timed on."""
    is_cuda = device is not None and device.type == "cuda"
    return is_cuda and torch.cuda.get_device_capability(device) == _HOPPER


def reset_peak(device: torch.device) -> None:
    """Forget memory peaks so far, after returning freed memory to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak(device)


def release_unused() -> None:
    """Give back what PyTorch keeps for later use: of GPUs' memory, and of pinned host memory."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()


def forget_peak(device: torch.device) -> None:
    """Count peaks from what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists() and os.access(_CLEAR_REFS, os.W_OK):
        _CLEAR_REFS.write_text("5")  # proc(5): resets VmHWM to the present resident size


def peak_bytes(device: torch.device) -> int:
    """Peak since `reset_peak`: CUDA memory allocated, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def context_bytes(device: torch.device) -> int:
    """Of CUDA memory in use, what PyTorch does not hold: the context, and other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


def process_bytes(device: torch.device) -> int:
    """Peak since `reset_peak`: CUDA memory held, with the context; a CPU's resident set."""
    if device.type != "cuda":
        return peak_bytes(device)
    return int(torch.cuda.max_memory_reserved(device)) + context_bytes(device)


def used_bytes(device: torch.device) -> int:
    """In use now: CUDA memory allocated, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def available_bytes(device: torch.device) -> int:
    """Of a GPU's memory, what this process's tensors have and could still take."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device))


def describe(device: torch.device) -> dict[str, str | int]:
    """Name, threads and memory of `device`, for a run's record."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "name": properties.name,
            "threads": torch.get_num_threads(),
            "memory_bytes": properties.total_memory,
        }
    return {
        "name": _cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _cpu_name() -> str:
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
