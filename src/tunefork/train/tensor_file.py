"""Named tensors in one safetensors file, written from where they lie and read back as they were.

The `safetensors` library copies all tensors to host memory before it writes the first byte; a
checkpoint of a full fine-tuning run would double the run. This writer goes tensor by tensor, and
hashes what it meant to write, so that the hash also finds what a disk changed. Reading is the
library's own, which checks every offset; the format has no code in it
(https://huggingface.co/docs/safetensors: header length, JSON header, bytes).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tunefork.errors import CheckpointError

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write `tensors`, flushed to the disk; returns the SHA-256 of the file's bytes.

    Raises OSError where it cannot be written.
    """
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            stream.write(part)
        for tensor in tensors.values():
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(values)
            stream.write(values)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of `file`, in host memory. Raises CheckpointError for a damaged one."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{file}: is no readable safetensors file ({error})") from error
