"""What may enter the store: known kinds of files, of bounded size, under plain relative names.

An artefact may come from anyone. Nothing in it is ever unpickled, so pickles are refused by name
and not only by silence; a path or a symbolic link that leaves the folder is refused before a byte
is read. The same rules hold for a folder that is published and for a manifest that is pulled.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from tunefork.errors import StoreError
from tunefork.registry.claim import LOCK

_TEXT = {".json", ".txt", ".jinja", ".md", ".yaml"}
_BARE = {"LICENSE", "NOTICE"}
_PICKLE = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
MAX_FILES = 2_000
MAX_DEPTH = 4
_MAX_BYTES = {".safetensors": 1 << 40, ".model": 1 << 28}
_MAX_TEXT_BYTES = 1 << 28
"""A tokenizer.json of a large vocabulary has some 30 MB."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Incoming:
    """A file of a folder that was found acceptable."""

    path: str
    """Relative to the folder, with '/' between its parts."""
    limit: int
    """Most bytes it may have."""


def check_path(path: str, where: str) -> int:
    """The most bytes that a file of this relative `path` may have. Raises StoreError."""
    parts = path.split("/")
    name = parts[-1]
    suffix = PurePosixPath(name).suffix.lower()
    if len(parts) > MAX_DEPTH or not all(_PART.fullmatch(p) and ".." not in p for p in parts):
        raise StoreError(
            f"{where}: {path!r} is refused as a file's name: it must be relative, at most "
            f"{MAX_DEPTH} parts deep, without '..', and of letters, digits, '.', '_' and '-'"
        )
    if suffix in _PICKLE:
        raise StoreError(
            f"{where}: {path}: {suffix} files are pickles, which can run code when they are read, "
            "and are refused; save the weights as safetensors, or move the file away"
        )
    if suffix in _TEXT or name in _BARE:
        return _MAX_TEXT_BYTES
    if suffix not in _MAX_BYTES:
        allowed = ", ".join(sorted([*_TEXT, *_MAX_BYTES, *_BARE]))
        raise StoreError(
            f"{where}: {path}: the store takes no such file; allowed are {allowed}; move it away"
        )
    return _MAX_BYTES[suffix]


def check_kind(paths: set[str], where: str) -> None:
    """Raise StoreError unless these files are an adapter's or a model's."""
    if {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= paths:
        return
    if "config.json" in paths and any(p.endswith(".safetensors") for p in paths):
        return
    raise StoreError(
        f"{where}: holds neither an adapter ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}) nor a model "
        "(config.json and *.safetensors)"
    )


def check_count(count: int, where: str) -> None:
    """Raise StoreError for more files than any model has."""
    if count > MAX_FILES:
        raise StoreError(f"{where}: holds more than {MAX_FILES} files")


def check_safetensors(file: Path, where: str) -> None:
    """Raise StoreError unless the header of `file` is sound: safetensors checks every offset."""
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{where}: is no safetensors file: {error}") from error


def check_numbers(file: Path, where: str) -> None:
    """Raise StoreError for an adapter's tensor that is not finite: no server would serve it."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (a safe_open is no dict)
            if not bool(tensors.get_tensor(name).float().isfinite().all()):  # 8-bit floats too
                raise StoreError(
                    f"{where}: {name} holds numbers that are not finite; train it anew"
                )


def incoming(folder: Path) -> list[Incoming]:
    """The files below `folder` in the order of their names; raises StoreError for what is refused.

    The folder itself may be named by a link; within it no link is followed.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such folder; give an adapter's or a run's")
    found: list[Incoming] = []
    root, seen = folder.resolve(), 0
    if (root / LOCK).exists():
        raise StoreError(
            f"{folder}: is a run's folder that holds no finished run; the same `tunefork train` "
            "goes on with it"
        )
    for at, folders, names, descriptor in os.fwalk(root, follow_symlinks=False):
        below = Path(at).relative_to(root)
        seen += len(folders) + len(names)
        check_count(seen, str(folder))
        for name in [*folders, *names]:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            _check_sort(status, folder, (below / name).as_posix())
        for name in names:
            path = (below / name).as_posix()
            found.append(Incoming(path, check_path(path, str(folder))))
    check_kind({file.path for file in found}, str(folder))
    return sorted(found, key=lambda file: file.path)


@contextmanager
def opened(folder: Path, file: Incoming) -> Iterator[BinaryIO]:
    """`file` for reading, each part of its path opened without following a link."""
    descriptor = os.open(folder.resolve(), os.O_RDONLY | os.O_DIRECTORY)
    parts = file.path.split("/")
    try:
        for part in parts:
            kind = os.O_DIRECTORY if part is not parts[-1] else os.O_NONBLOCK  # a FIFO never blocks
            inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        _check_sort(os.fstat(descriptor), folder, file.path)
        stream = os.fdopen(descriptor, "rb", closefd=False)
        with stream:
            yield stream
    finally:
        os.close(descriptor)


def _check_sort(status: os.stat_result, folder: Path, path: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise StoreError(
            f"{folder}: {path}: is a symbolic link, which is refused; copy the folder with its "
            "links resolved (cp -rL) and give the copy"
        )
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise StoreError(f"{folder}: {path}: is neither a file nor a folder, and is refused")
