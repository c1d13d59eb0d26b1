"""Kernels in C, compiled where they run: for this processor, by its compiler, into the cache.

A CPU has no Triton. What a kernel needs is a compiler (`CC`, else gcc or cc), a second, and no
header but the compiler's own: it takes addresses, and gives nothing back. Its loops are shared out
by the OpenMP that PyTorch has loaded, and by no second one: two would each keep threads that wait
at work, more than there are cores.

Without a compiler, or on another system than Linux, there is no kernel, and PyTorch's operations
take its place; the log says why.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from tunefork.home import cache_folder

_FLAGS = ("-O3", "-fopenmp", "-fPIC", "-std=gnu11", "-fno-math-errno")
_SECONDS = 120.0
"""Of a compiler. The kernels take one each."""


@cache
def library(name: str, *definitions: str) -> ctypes.CDLL | None:
    """`name`.c of this folder with macros defined, compiled once for this processor; None without
    a compiler."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(str(_compiled(Path(__file__).with_name(f"{name}.c"), definitions)))
    except (OSError, subprocess.SubprocessError, LookupError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logging.getLogger(__name__).warning(
            "%s.c is not used, but PyTorch's operations, which are slower: %s", name, said.strip()
        )
        return None


def _compiled(source: Path, definitions: tuple[str, ...]) -> Path:
    compiler = _compiler()
    flags = (*_FLAGS, *(f"-D{one}" for one in definitions), _tuned())
    runtime = _openmp()
    known = (source.read_text("utf-8"), *compiler, *flags, str(runtime), _processor())
    digest = hashlib.sha256("\0".join(known).encode()).hexdigest()[:24]
    folder = cache_folder() / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = folder / f"{source.stem}-{digest}.so"
    if made.exists() and _is_ours(folder) and _is_ours(made):
        return made
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        parts = Path(scratch) / "part.o", Path(scratch) / made.name
        # Linked apart: with -fopenmp the compiler would add a runtime of its own.
        commands = (
            [*compiler, *flags, "-c", str(source), "-o", str(parts[0])],
            [*compiler, "-shared", str(parts[0]), str(runtime), "-o", str(parts[1])],
        )
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        parts[1].replace(made)  # at once, for other processes that look for it
    return made


def _compiler() -> list[str]:
    wanted = shlex.split(os.environ.get("CC", ""))
    for name, *options in [wanted] if wanted else [["gcc"], ["cc"]]:
        if found := shutil.which(name):
            return [found, *options]
    raise LookupError(f"there is no compiler ({' '.join(wanted) or 'gcc or cc'})")


def _tuned() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def _processor() -> str:
    """What `native` stands for: homes are shared by machines."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    said = {line for line in lines if line.startswith(("flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(said)])


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
    function = getattr(ctypes.CDLL(torch._C.__file__), "omp_get_max_threads", None)
    place = _Place()
    if function is None or not ctypes.CDLL(None).dladdr(function, ctypes.byref(place)):
        raise LookupError("PyTorch was built without OpenMP")
    return Path(os.fsdecode(place.file))
