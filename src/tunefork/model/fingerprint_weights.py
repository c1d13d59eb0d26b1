"""SHA-256 of a model's weights by value, whatever files and dtypes they are stored in.

    chunk   2^20 values of a tensor: "bf16" + 2 bytes each where bf16 holds all of them exactly,
            else "fp32" + 4 bytes each; every NaN as the one quiet NaN, -0.0 as it is
    piece   SHA-256 of 16 chunks
    tensor  SHA-256 of its pieces
    model   SHA-256 of a line [name, shape, digest] for each tensor, by name

So a value has one form in bf16, fp16, fp8 and fp32 containers, and the form of most models' weights
is the bytes that lie on disk. Integers, and fp64, are hashed as stored, under their dtype's name.
Pieces are hashed by as many threads as there are cores (hashlib, NumPy and pread let the
interpreter go), each holding one chunk: no tensor is ever in memory whole.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from tunefork.model.damage import unreadable

_CHUNK = 1 << 20
"""Values. Part of the definition: another number gives other fingerprints."""
_PIECE = 16 * _CHUNK
_MAX_THREADS = 16

_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
_SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
"""Bytes of a value, by safetensors' names."""
_FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor's values lie."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Of its first byte, in the file."""


def weights_sha256(files: Sequence[Path], aliases: Mapping[str, str], what: str) -> str:
    """The digest of all tensors in the safetensors `files`.

    `aliases` maps a tied tensor's name to the one that it shares its values with: where both are
    stored and equal, one counts. Raises ModelError, opening with `what`, for damaged files.
    """
    with unreadable(f"{what} cannot be read"), ExitStack() as stack:
        tensors: dict[str, Stored] = {}
        descriptors: dict[Path, int] = {}
        for file in files:
            descriptors[file] = stack.enter_context(file.open("rb", buffering=0)).fileno()
            for stored in read_header(file):
                if tensors.setdefault(stored.name, stored) is not stored:
                    raise ValueError(f"{file.name} holds {stored.name}, as another file does")
        digests = _digests(tensors, descriptors)
    lines: dict[str, str] = {}
    for name in sorted(tensors, key=lambda name: (name in aliases, name)):
        line = json.dumps([list(tensors[name].shape), digests[name]])
        target = aliases.get(name, name)
        if lines.setdefault(target, line) != line:
            lines[name] = line  # said to be tied, and is not
    text = "".join(f"{json.dumps(name)} {lines[name]}\n" for name in sorted(lines))
    return hashlib.sha256(text.encode()).hexdigest()


def read_header(file: Path) -> list[Stored]:
    """Every tensor of a safetensors file; raises SafetensorError or ValueError for a bad one."""
    with safe_open(file, framework="numpy"):  # its own checks: sizes, offsets, no gaps
        pass
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _SIZES:
            raise ValueError(f"{file.name}: {name} has the unknown dtype {entry['dtype']}")
    return [
        Stored(
            file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    ]


def _digests(tensors: Mapping[str, Stored], descriptors: Mapping[Path, int]) -> dict[str, str]:
    """Name -> hex digest of each tensor's values."""

    def digest(piece: tuple[str, int]) -> bytes:
        stored = tensors[piece[0]]
        return _digest_piece(stored, descriptors[stored.file], piece[1])

    pieces = list(_pieces(tensors))
    hashes = {name: hashlib.sha256() for name in tensors}
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="fingerprint") as pool:
        for (name, _), found in zip(pieces, pool.map(digest, pieces), strict=True):
            hashes[name].update(found)
    return {name: found.hexdigest() for name, found in hashes.items()}


def _pieces(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, int]]:
    """(name, index of the first value), in the order in which they lie on disk."""
    for name, stored in tensors.items():
        for first in range(0, math.prod(stored.shape), _PIECE):
            yield name, first


def _digest_piece(stored: Stored, descriptor: int, first: int) -> bytes:
    size = _SIZES[stored.dtype]
    end = min(math.prod(stored.shape), first + _PIECE)
    digest = hashlib.sha256()
    for at in range(first, end, _CHUNK):
        wanted = (min(end, at + _CHUNK) - at) * size
        raw = os.pread(descriptor, wanted, stored.start + at * size)
        if len(raw) < wanted:
            raise OSError(f"{stored.file.name} ended within {stored.name}")
        form, values = canonical(raw, stored.dtype)
        digest.update(form)
        digest.update(values)
    return digest.digest()


def canonical(raw: bytes, dtype: str) -> tuple[bytes, Any]:
    """The name of a chunk's form and its bytes: equal for equal values in every container."""
    if dtype == "BF16":
        halves = np.frombuffer(raw, "<u2")
        magnitudes = halves & 0x7FFF
        if magnitudes.max(initial=0) > 0x7F80:
            halves = np.where(magnitudes > 0x7F80, np.uint16(0x7FC0), halves)
        return b"bf16", halves
    if dtype == "F32":
        bits = np.frombuffer(raw, "<u4")
    elif dtype == "F16":
        bits = np.frombuffer(raw, "<f2").astype("<f4").view("<u4")
    elif dtype in _FP8:
        bits = torch.frombuffer(bytearray(raw), dtype=_FP8[dtype]).float().numpy().view("<u4")
    else:
        return dtype.encode(), raw
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if is_nan.any():
        bits = np.where(is_nan, np.uint32(0x7FC00000), bits)
    if (bits.view("<u2")[::2]).any():
        return b"fp32", bits
    return b"bf16", np.ascontiguousarray(bits.view("<u2")[1::2])
