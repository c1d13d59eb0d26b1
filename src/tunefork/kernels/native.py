"""Kernels in C, compiled where they run: for this processor, by its compiler, into the cache.

A CPU has no Triton. What a kernel needs is gcc (or what `CC` names), a second, and none of a
system's headers or libraries: it takes addresses, and gives nothing back. Its loops are shared out
by the OpenMP that PyTorch has loaded, and by no second one: two would each keep threads that wait
at work, more than there are cores.

Without a compiler, on another system than Linux, or where the kernel's source says that it is no
gain, there is none, and PyTorch's operations take its place; the log says why.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from tunefork.home import cache_folder

_FLAGS = ("-O3", "-fopenmp", "-fPIC", "-std=gnu11", "-ffreestanding", "-fno-math-errno")
_LIMIT_S = 60.0
"""Of a compiler. The kernels take one second each."""
_LOCK = Lock()


def function(
    name: str, symbol: str, arguments: Sequence[Any], definitions: Sequence[str] = ()
) -> Callable[..., None] | None:
    """`symbol` of this folder's `name`.c with macros defined, called with ctypes' `arguments`;
    compiled once for this processor. None where it cannot be had."""
    try:
        with _LOCK:  # threads that come first together would all compile
            library = _library(Path(__file__).with_name(f"{name}.c"), definitions)
        found = getattr(library, symbol)
    except (OSError, LookupError, ValueError, RuntimeError) as error:
        logging.getLogger(__name__).warning(
            "%s.c is not used, but PyTorch's operations, which are slower: %s", name, error
        )
        return None
    found.argtypes, found.restype = tuple(arguments), None
    called: Callable[..., None] = found
    return called


def _library(source: Path, definitions: Sequence[str]) -> ctypes.CDLL:
    if sys.platform != "linux":
        raise LookupError(f"it is not made for {sys.platform}")
    compiler, runtime = _compiler(), _openmp()
    native = "-march=native" if platform.machine() == "x86_64" else "-mcpu=native"
    flags = (*_FLAGS, *(f"-D{one}" for one in definitions), native)
    known = source.read_text("utf-8"), *compiler, _version(compiler[0]), *flags, str(runtime)
    digest = hashlib.sha256("\0".join([*known, _processor()]).encode()).hexdigest()[:24]
    folder = _own_folder()
    if folder is None:  # used from a folder that is gone at once: a library stays loaded
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "kernel.so"
            _compile(source, made, compiler, flags, runtime)
            return ctypes.CDLL(str(made))
    made = folder / f"{source.stem}-{digest}.so"
    if made.exists() and _is_ours(made):
        try:
            return ctypes.CDLL(str(made))
        except OSError:  # half a file: the machine went down while it was written
            made.unlink()
    _compile(source, made, compiler, flags, runtime)
    return ctypes.CDLL(str(made))


def _compile(
    source: Path, made: Path, compiler: Sequence[str], flags: Sequence[str], runtime: Path
) -> None:
    """Write `made`, at once: other processes may look for it."""
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        part, whole = Path(scratch) / "part.o", Path(scratch) / "whole.so"
        # Linked apart: with -fopenmp the compiler would add a runtime of its own.
        _run([*compiler, *flags, "-c", str(source), "-o", str(part)])
        _run([*compiler, "-shared", "-nostdlib", str(part), str(runtime), "-o", str(whole)])
        whole.chmod(0o700)
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        whole.replace(made)


def _run(command: list[str]) -> None:
    """Raises RuntimeError with what the compiler says, or that it did not end."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        errors="replace",
        text=True,
    )
    try:
        _, said = process.communicate(timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
        process.communicate()
        raise RuntimeError(f"{command[0]} was not done after {_LIMIT_S:.0f} s") from None
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {said.strip()[:600]}")


def _compiler() -> list[str]:
    wanted = shlex.split(os.environ.get("CC", ""))
    for name, *options in [wanted] if wanted else [["gcc"], ["cc"]]:
        if found := shutil.which(name):
            return [found, *options]
    raise LookupError(f"there is no compiler ({' '.join(wanted) or 'gcc or cc'})")


def _version(compiler: str) -> str:
    """Another where the compiler is another, without starting it."""
    file = Path(compiler).resolve()
    return f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"


def _processor() -> str:
    """What `native` stands for: homes are shared by machines."""
    lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    names = ("flags", "Features", "CPU part", "cpu family", "model")
    said = {line for line in lines if line.startswith(names)}
    return "\n".join([platform.machine(), *sorted(said)])


def _own_folder() -> Path | None:
    """For what is compiled; None where nothing can be kept, or others may have written."""
    try:
        folder = cache_folder() / "kernels"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # the second: a user without a home
        return None
    return folder if _is_ours(folder) and os.access(folder, os.W_OK) else None


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have written there."""
    found = path.stat()
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


class _Place(ctypes.Structure):
    """dladdr's Dl_info."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _openmp() -> Path:
    """The file of the OpenMP that PyTorch computes with. LookupError where it has none."""
    asked = getattr(ctypes.CDLL(torch._C.__file__), "omp_get_max_threads", None)
    place = _Place()
    if asked is None or not ctypes.CDLL(None).dladdr(asked, ctypes.byref(place)):
        raise LookupError("PyTorch was built without OpenMP")
    return Path(os.fsdecode(place.file))
