"""One checkpoint: a folder that is whole or is not there, and what makes it believed.

    step-000120/state.safetensors   the tensors of `state.py`
    step-000120/state.json          how far, of which run, in what environment
    step-000120/manifest.json       SHA-256 and size of both, written last

It is written into a scratch folder beside, every file flushed to the disk, then renamed, then the
folder above is flushed: a kill or a power cut at any moment leaves the old checkpoints and either
all of the new one or none. Nothing in it is code: tensors and JSON only.
"""

import hashlib
import os
import shutil
import stat
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunefork.errors import CheckpointError, fault_in, is_disk_full
from tunefork.train.state import Progress, State
from tunefork.train.tensor_file import read_tensors, write_tensors

TENSORS, FACTS, MANIFEST = "state.safetensors", "state.json", "manifest.json"
SCRATCH = ".scratch-"
"""What folders that are being written or removed begin with."""

_LARGEST_JSON_BYTES = 2**20

Value = str | bool | int | float | None
Content = TypeVar("Content", bound=BaseModel)
Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _File(_Content):
    sha256: str
    num_bytes: Count


class _Manifest(_Content):
    format: Literal["tunefork checkpoint 1"]
    files: dict[Literal["state.safetensors", "state.json"], _File]


class Facts(_Content):
    """What state.json says of the tensors beside it."""

    step: Count
    tokens: Count
    supervised_tokens: Count
    seconds: Annotated[float, Field(ge=0.0)]
    micro_batch_tokens: Annotated[int, Field(ge=1)] | None = None
    skipped: tuple[Count, ...] = ()
    losses: tuple[float, ...] = ()
    best_step: Count = 0
    best_loss: float | None = None
    setting: dict[str, Value]
    """What the run is of: going on with another is refused."""
    environment: dict[str, Value]
    """What its bits may depend on: going on in another is said."""

    def progress(self) -> Progress:
        """As the loop counts it."""
        return Progress(**{f.name: getattr(self, f.name) for f in fields(Progress)})


def folder_name(step: int) -> str:
    """`step-000120`."""
    return f"step-{step:06d}"


def step_of(folder: Path) -> int | None:
    """120 of `step-000120`; None for what is no checkpoint's name."""
    start, _, digits = folder.name.partition("-")
    is_one = start == "step" and digits.isascii() and digits.isdigit() and len(digits) < 19
    return int(digits) if is_one else None


def write(
    state: State, folder: Path, *, setting: dict[str, Value], environment: dict[str, Value]
) -> Path:
    """Make the checkpoint of `state` in `folder`; returns it.

    Raises CheckpointError where it cannot be written, and leaves what was there.
    """
    progress = state.progress
    target = folder / folder_name(progress.step)
    scratch = folder / f"{SCRATCH}{target.name}"
    facts = Facts(**asdict(progress), setting=setting, environment=environment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        hashes = {TENSORS: write_tensors(scratch / TENSORS, state.tensors)}
        hashes[FACTS] = _write_text(scratch / FACTS, facts.model_dump_json(indent=1))
        files = {
            name: {"sha256": sha256, "num_bytes": (scratch / name).stat().st_size}
            for name, sha256 in hashes.items()
        }
        manifest = _Manifest.model_validate({"format": "tunefork checkpoint 1", "files": files})
        _write_text(scratch / MANIFEST, manifest.model_dump_json(indent=1))
        sync(scratch)
        discard(target)
        scratch.rename(target)
        sync(folder)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        why = f"the disk is full ({error.strerror})" if is_disk_full(error) else str(error)
        raise CheckpointError(
            f"{target}: cannot be written: {why}. The checkpoints before it are as they were: "
            "mend that and run the same command again, and it goes on from the newest"
        ) from error
    return target


def read_facts(folder: Path) -> Facts:
    """What a checkpoint says of itself, once every byte of it is as its manifest says.

    Raises CheckpointError for a damaged one.
    """
    manifest = _read_json(_Manifest, folder / MANIFEST)
    for name in (TENSORS, FACTS):
        if name not in manifest.files:
            raise CheckpointError(f"{folder / MANIFEST}: does not list {name}")
        wanted, file = manifest.files[name], folder / name
        size = _regular(file).st_size
        if size != wanted.num_bytes:
            raise CheckpointError(f"{file}: has {size} bytes, not {wanted.num_bytes}")
        if _sha256(file) != wanted.sha256:
            raise CheckpointError(f"{file}: is not what was written (its SHA-256 differs)")
    facts = _read_json(Facts, folder / FACTS)
    if folder_name(facts.step) != folder.name:
        raise CheckpointError(f"{folder / FACTS}: is of step {facts.step}")
    return facts


def read_setting(folder: Path) -> dict[str, Value]:
    """The setting that a checkpoint, whole or not, was written with. Raises CheckpointError."""
    return _read_json(Facts, folder / FACTS).setting


def read(folder: Path, facts: Facts) -> State:
    """The state in a checkpoint whose facts were read. Raises CheckpointError."""
    return State(facts.progress(), read_tensors(folder / TENSORS))


def discard(folder: Path) -> None:
    """Remove a checkpoint so that a kill half way leaves no torn one under its name."""
    if folder.is_dir():
        away = folder.with_name(f"{SCRATCH}removed-{folder.name}")
        shutil.rmtree(away, ignore_errors=True)
        folder.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(file: Path, text: str) -> str:
    """Write, flush to the disk, and return the SHA-256."""
    content = text.encode()
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return hashlib.sha256(content).hexdigest()


def _regular(file: Path) -> os.stat_result:
    """`file`'s facts; a pipe or a device in its place would be waited for."""
    try:
        found = file.lstat()
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{file}: is no file")
    return found


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error


def _read_json(kind: type[Content], file: Path) -> Content:
    if _regular(file).st_size > _LARGEST_JSON_BYTES:
        raise CheckpointError(f"{file}: is too long to be a checkpoint's")
    try:
        return kind.model_validate_json(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise CheckpointError(f"{file}: {fault_in(error)}") from error
