"""Files from strangers: safetensors and JSON only, looked at before they are believed.

Nothing of a file is read before its size is known to be small, no tensor (`safe_tensors.py`) before
its header is known to be consistent and its shapes are those that the base asks for. Links are
refused, because a folder that was downloaded could name any file of this machine, and pickles by
name, because loading one runs code.

Header: https://huggingface.co/docs/safetensors#format
"""

import errno
import json
import os
import stat
import struct
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import torch

from tunefork.errors import AdapterError

MOST_JSON_BYTES = 4 << 20
MOST_HEADER_BYTES = 16 << 20
_MOST_DIMENSIONS = 8
_MOST_ELEMENTS = 1 << 48
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Of a trained tensor."""
_SAID = {"dtype", "shape", "data_offsets"}
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as its file's header has it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Its first byte, after the header."""
    end: int


class Header(dict[str, Entry]):
    """A safetensors file's tensors by key, known to lie in it side by side."""

    def __init__(self, entries: dict[str, Entry], text: bytes) -> None:
        super().__init__(entries)
        self.text = text
        """As the file has it, its length in front."""


def check_folder(folder: Path, weights: str) -> None:
    """Raise AdapterError where `folder` is none, or holds a pickle in the place of `weights`."""
    if not folder.is_dir():
        raise AdapterError(f"{folder}: is no folder")
    if (folder / weights).exists():
        return
    for name in _PICKLES:
        if (folder / name).exists():
            raise AdapterError(
                f"{folder / name}: is a pickle, which can run code when it is loaded, and is never "
                f"read; ask its author for {weights}, or convert it where you trust it: load it "
                "with the PEFT library and save_pretrained(folder)"
            )


def read_json(file: Path) -> dict[str, Any]:
    """A small JSON object, each key once. Raises AdapterError."""
    with opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MOST_JSON_BYTES:
            raise AdapterError(
                f"{file}: has {size:,} bytes; at most {MOST_JSON_BYTES:,} are read as a "
                "configuration"
            )
        return _parse(stream.read(MOST_JSON_BYTES), file)


def read_header(file: Path) -> Header:
    """What a safetensors file says of its tensors. Raises AdapterError."""
    with opened(file) as stream:
        return _header_of(stream, file)


def opened(file: Path) -> BufferedReader:
    """`file` open for reading, if it is a plain file and no link."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise AdapterError(
                f"{file}: is a symbolic link, which could lead anywhere; copy the folder with its "
                "links resolved (cp -rL)"
            ) from error
        raise AdapterError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise AdapterError(f"{file}: cannot be read: {error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterError(f"{file}: is no plain file")
    return os.fdopen(descriptor, "rb")


def _header_of(stream: BufferedReader, file: Path) -> Header:
    size = os.fstat(stream.fileno()).st_size
    start = stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
        raise AdapterError(
            f"{file}: cannot be read: no safetensors file, or cut short: its header would have "
            f"{length:,} of {size:,} bytes (at most {MOST_HEADER_BYTES:,} are read)"
        )
    text = stream.read(length)
    header = _parse(text, file)
    header.pop("__metadata__", None)
    entries, spans = {}, []
    for key, value in header.items():
        entry = entries[key] = _entry(value, file, key)
        spans.append((entry.begin, entry.end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise AdapterError(f"{file}: its tensors overlap, or leave gaps, at byte {at:,}")
        at = end
    if at != size - 8 - length:
        raise AdapterError(
            f"{file}: its header asks for {at:,} bytes of tensors, and {size - 8 - length:,} follow"
        )
    return Header(entries, start + text)


def _entry(value: Any, file: Path, key: str) -> Entry:
    def fault(what: str) -> AdapterError:
        return AdapterError(f"{file}: {key[:200]!r}: its {what}")

    if not isinstance(value, dict) or value.keys() != _SAID:
        raise fault("header entry has not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise fault(f"dtype is none of {', '.join(_DTYPES)}")
    if not _is_sizes(shape, _MOST_DIMENSIONS) or (numel := prod(shape)) > _MOST_ELEMENTS:
        raise fault(f"shape is no list of at most {_MOST_DIMENSIONS} sizes")
    if not _is_sizes(offsets, 2) or len(offsets) != 2:
        raise fault("data_offsets are no two byte positions")
    num_bytes = numel * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise fault(f"shape needs {num_bytes:,} bytes, its offsets differ")
    return Entry(_DTYPES[dtype], tuple(shape), *offsets)


def _is_sizes(value: Any, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(item) is int and 0 <= item < _MOST_ELEMENTS for item in value)
    )


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_each_once, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise AdapterError(f"{file}: is nested too deeply") from error
    except ValueError as error:  # bad UTF-8 or JSON, a number of thousands of digits
        raise AdapterError(f"{file}: cannot be read: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{file}: must hold a JSON object")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
