"""A stranger's tensors, read in one piece and looked at before they are believed.

A server reads adapters while its engine computes, and both want the interpreter and the cores. So a
header is parsed once, a file comes with one call into memory that is got in large pages (an adapter
of an 8B model is 84 MB, and 20,000 small pages take longer than reading it), its values are looked
at all at once, and each tensor is a view. These calls are few, and all of them let the interpreter
go.
"""

import mmap
import os
from contextlib import suppress
from io import BufferedReader
from itertools import groupby
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from tunefork.errors import AdapterError
from tunefork.registry.safe_read import Entry, Header, opened


def read_tensors(file: Path, entries: Header, *, most: float = inf) -> dict[str, Tensor]:
    """The tensors of a file whose header still is what it was, parts of one piece of memory.

    Raises AdapterError, also for values beyond `most`.
    """
    with opened(file) as stream:
        start, size = len(entries.text), max((entry.end for entry in entries.values()), default=0)
        is_as_long = os.fstat(stream.fileno()).st_size == start + size
        if not is_as_long or stream.read(start) != entries.text:
            raise AdapterError(f"{file}: changed while it was read; try again")
        content = _content(stream, start, size, file)
    ordered = sorted(entries.values(), key=lambda entry: (entry.begin, entry.end))
    runs = [list(run) for _, run in groupby(ordered, key=lambda entry: entry.dtype)]
    if not all(_within(_part(content, run[0], run[-1].end), most) for run in runs):
        for key, entry in entries.items():
            if not _within(_part(content, entry, entry.end), most):
                what = "NaN or infinite values" if most == inf else f"NaN, or values above {most:g}"
                raise AdapterError(f"{file}: {key} holds {what}")
    return {
        key: _part(content, entry, entry.end).view(entry.shape) for key, entry in entries.items()
    }


def _content(stream: BufferedReader, start: int, size: int, file: Path) -> Tensor:
    """The bytes from `start` on, (`size`,) uint8."""
    content = _room(size)
    if hasattr(os, "posix_fadvise"):  # so that a disk is not asked for one small part at a time
        os.posix_fadvise(stream.fileno(), start, size, os.POSIX_FADV_WILLNEED)
    stream.seek(start)
    try:
        num_read = stream.readinto(content.numpy().data)
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read: {error.strerror}") from error
    if num_read != size:
        raise AdapterError(f"{file}: changed while it was read; try again")
    return content


def _room(size: int) -> Tensor:
    """New memory for so many bytes; in large pages, which are got and given back far sooner."""
    if size == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8)


def _part(content: Tensor, first: Entry, end: int) -> Tensor:
    """From `first` to `end`, in the dtype of `first`."""
    part = content[first.begin : end]
    if first.begin % first.dtype.itemsize:
        part = part.clone()  # a view of another dtype has to begin at a whole element
    return part.view(first.dtype)


def _within(tensor: Tensor, most: float) -> bool:
    """Whether all values are finite, and none above `most`. By extremes, which a NaN is one of: a
    tenth of the time of `torch.isfinite` on a CPU."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    most = min(most, torch.finfo(tensor.dtype).max)
    return -most <= float(low) and float(high) <= most
