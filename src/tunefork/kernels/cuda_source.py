"""Kernels in CUDA C++, compiled where they run: by the NVRTC that PyTorch brings, and the driver.

For what Triton has no words for. NVRTC needs no compiler of the machine's and no header, and a
kernel takes it less than a second, once in a process.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunefork.errors import TuneforkError

_ARCHITECTURE = b"--gpu-architecture=sm_90a"
"""Hopper's, with the instructions that are of no other GPU."""
_DYNAMIC_MEMORY = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
_MAP_KINDS = {torch.int8: 0, torch.bfloat16: 9}
"""CU_TENSOR_MAP_DATA_TYPE_UINT8 and _BFLOAT16."""
_SWIZZLE_128, _PROMOTE_128 = 3, 2
"""CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B."""
_POINTER = ctypes.c_void_p


class CudaSourceError(TuneforkError):
    """A kernel cannot be compiled or started here."""


class CudaKernel:
    """A kernel on one GPU."""

    def __init__(
        self, source: str, name: str, device: torch.device, *, threads: int, shared_bytes: int
    ) -> None:
        """`shared_bytes` are dynamic, of each block. Raises CudaSourceError."""
        self.driver, self.threads, self.shared_bytes = _driver(), threads, shared_bytes
        self.processors: int = torch.cuda.get_device_properties(device).multi_processor_count
        image, module, self.function = compiled(source, name), _POINTER(), _POINTER()
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # a call of the runtime's: its context is the current one
            self.check(self.driver.cuModuleLoadData(ctypes.byref(module), image))
            named = ctypes.byref(self.function), module, name.encode()
            self.check(self.driver.cuModuleGetFunction(*named))
            room = self.function, _DYNAMIC_MEMORY, shared_bytes
            self.check(self.driver.cuFuncSetAttribute(*room))

    def launch(self, blocks: int, arguments: Sequence[Any]) -> None:
        """Start it in the current stream of its device, which is the current one. `arguments` are
        ctypes' values, and maps."""
        addresses = (_POINTER * len(arguments))(*(ctypes.addressof(one) for one in arguments))
        stream = torch.cuda.current_stream().cuda_stream
        shape = (blocks, 1, 1, self.threads, 1, 1, self.shared_bytes)
        self.check(self.driver.cuLaunchKernel(self.function, *shape, stream, addresses, None))

    def map(self, rows: Tensor, box_columns: int, box_rows: int) -> Any:
        """What the hardware copies boxes of a matrix by (a CUtensorMap); outside of it are zeros.

        `rows` is int8 or bf16, its rows contiguous and a multiple of 16 bytes apart, a box's rows
        128 bytes.
        """
        room = (ctypes.c_char * (_MAP_BYTES + _MAP_ALIGNMENT))()
        start = -ctypes.addressof(room) % _MAP_ALIGNMENT
        made = (ctypes.c_char * _MAP_BYTES).from_buffer(room, start)
        counts = (ctypes.c_uint64 * 2)(rows.shape[1], rows.shape[0])
        pitch = (ctypes.c_uint64 * 1)(rows.stride(0) * rows.element_size())
        box, steps = (ctypes.c_uint32 * 2)(box_columns, box_rows), (ctypes.c_uint32 * 2)(1, 1)
        kind = _MAP_KINDS[rows.dtype]
        told = kind, 2, rows.data_ptr(), counts, pitch, box, steps
        encode = self.driver.cuTensorMapEncodeTiled
        self.check(encode(made, *told, 0, _SWIZZLE_128, _PROMOTE_128, 0))
        return made

    def check(self, status: int) -> None:
        """Raise CudaSourceError for what the driver answers unless it is 0."""
        if status:
            said = ctypes.c_char_p()
            self.driver.cuGetErrorString(status, ctypes.byref(said))
            raise CudaSourceError(f"CUDA's driver: {(said.value or b'?').decode()} ({status})")


def compiled(source: str, name: str) -> bytes:
    """Machine code for Hopper. Raises CudaSourceError with what NVRTC says."""
    nvrtc, program, size = _nvrtc(), _POINTER(), ctypes.c_size_t()
    text = source.encode()
    _check_nvrtc(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, f"{name}.cu".encode(), 0, None, None)
    )
    try:
        options = (ctypes.c_char_p * 1)(_ARCHITECTURE)
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status:
            _check_nvrtc(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _check_nvrtc(nvrtc.nvrtcGetProgramLog(program, log))
            raise CudaSourceError(f"NVRTC does not compile {name}: {log.value.decode()[:2000]}")
        _check_nvrtc(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        image = ctypes.create_string_buffer(size.value)
        _check_nvrtc(nvrtc.nvrtcGetCUBIN(program, image))
        return image.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _check_nvrtc(status: int) -> None:
    if status:
        raise CudaSourceError(f"NVRTC answers {status}")


def _driver() -> ctypes.CDLL:
    driver = _library("libcuda.so.1")
    # Addresses are 64 bits, which ctypes takes no Python integer for unless told.
    word, number, pointer = ctypes.c_uint, ctypes.c_int, _POINTER
    try:
        encode, launch = driver.cuTensorMapEncodeTiled, driver.cuLaunchKernel
    except AttributeError as error:
        raise CudaSourceError(f"CUDA's driver is older than CUDA 12: {error}") from None
    encode.argtypes = (pointer, number, word, *[pointer] * 5, *[number] * 4)
    launch.argtypes = (pointer, *[word] * 7, pointer, pointer, pointer)
    return driver


def _nvrtc() -> ctypes.CDLL:
    name = f"libnvrtc.so.{(torch.version.cuda or '').partition('.')[0]}"
    # PyTorch's wheels bring it in a package beside their own, which nothing may have loaded yet.
    beside = Path(torch.__file__).parents[1].glob(f"nvidia/*/lib/{name}")
    return _library(str(next(beside, name)))


def _library(name: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise CudaSourceError(f"{name} is not found: {error}") from None
