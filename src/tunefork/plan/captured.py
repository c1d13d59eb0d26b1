"""Layers' programs, remembered on the disk: the compiler is asked once for a model and a method.

Files lie in TUNEFORK_HOME/captured, one for each question. A file's name is a hash of all that the
answer follows from: the model's configuration, how it is built, the versions of PyTorch,
transformers and bitsandbytes, and this library's own source. A file that cannot be read is made
anew, a folder that cannot be written is done without.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from tunefork.home import home
from tunefork.plan.built import Build
from tunefork.plan.capture import Layer

_MOST_FILES = 100
_PACKAGES = ("torch", "transformers", "bitsandbytes")
_SOURCES = ("kernels", "model", "plan", "recipe", "train/engine.py")
"""Of this library: what the programs follow from."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A model's layers; None where they cannot be captured."""

    distinct: tuple[Layer, ...]
    order: tuple[int, ...] | None
    """Of each layer of the model, which."""


_FORMAT = TypeAdapter(_Kept)


def remembered(
    config: Any, made: Build, capture: Callable[[], list[Layer] | None]
) -> list[Layer] | None:
    """What `capture()` gives for the layers of `config`'s model, or gave before."""
    file = home() / "captured" / f"{_key(config, made)}.json"
    with suppress(OSError, ValidationError):
        kept = _FORMAT.validate_json(file.read_bytes())
        os.utime(file)
        return None if kept.order is None else [kept.distinct[at] for at in kept.order]
    layers = capture()
    with suppress(OSError):
        _write(file, layers)
    return layers


def _write(file: Path, layers: list[Layer] | None) -> None:
    distinct: list[Layer] = []
    for layer in layers or []:
        if layer not in distinct:
            distinct.append(layer)
    order = None if layers is None else tuple(distinct.index(layer) for layer in layers)
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.write_bytes(_FORMAT.dump_json(_Kept(tuple(distinct), order)))
    scratch.replace(file)
    for old in sorted(file.parent.glob("*.json"), key=os.path.getmtime)[:-_MOST_FILES]:
        old.unlink(missing_ok=True)


def _key(config: Any, made: Build) -> str:
    within = "selective" if made.checkpointing == "selective" else "none"
    asks_dynamo = torch.cuda.is_available()  # `capture` does
    built = (repr(made.modules), repr(made.form), within, str(asks_dynamo))
    parts = (config.to_json_string(), *built, *_versions())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@cache
def _versions() -> tuple[str, ...]:
    """Of the packages and of this library's source."""
    found = []
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for source in _SOURCES:
        path = root / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return (*found, digest.hexdigest())
